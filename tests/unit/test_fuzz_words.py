"""What is typed for `channels`, said by SLURM, or crosses the wire: understood, or refused."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from fuzzing import CASES, repeat, said
from hypothesis import strategies as st

from csipipe.channels import axes
from csipipe.channels.words import shares, sizes
from csipipe.comm import codec
from csipipe.run import slurm
from csipipe.settings.config import CommSettings
from csipipe.settings.launcher import launched
from csipipe.settings.tables import CODECS

NUMBERS = st.integers(-2, 10**6).map(str) | st.floats().map(str) | st.text(max_size=3)


@CASES
def test_axes_are_understood_or_refused(cases: int) -> None:
    word = st.sampled_from([*axes.WORDS, *axes.WORDS, "", "(", ")", "=", "tx=0", "rx=99999999999"])
    sized = st.tuples(word, st.integers(0, 9)).map(lambda pair: f"{pair[0]}={pair[1]}")
    inside = st.lists(word | sized, min_size=1, max_size=3).map(
        lambda words: f"({' '.join(words)})"
    )
    plain = st.lists(word | sized | inside, max_size=6).map(" ".join)
    fitting = st.permutations(["sample", "rx", "tx", "subcarrier"]).map(" ".join)
    accepted = []

    @repeat(
        cases,
        plain | fitting | st.text(max_size=12),
        st.lists(st.integers(1, 4), min_size=1, max_size=5),
    )
    def check(text: str, shape: list[int]) -> None:
        try:
            found = axes.parse(text)
        except ValueError as refusal:
            said(refusal, "--axes")
            return
        try:
            found.sizes(tuple(shape))
        except ValueError as refusal:
            said(refusal, "--axes")
            return
        accepted.append(text)
        arranged = found.arrange(np.zeros(shape, np.float32))
        assert arranged.size in (np.prod(shape), np.prod(shape) / 2)

    check()
    assert len(accepted) > cases / 200


@CASES
def test_sizes_and_shares_are_understood_or_refused(cases: int) -> None:
    @repeat(cases, st.lists(NUMBERS, max_size=4), st.sampled_from(["x", "/"]))
    def check(numbers: list[str], mark: str) -> None:
        text = mark.join(numbers)
        for read, option in ((sizes, "--array"), (shares, "--split")):
            try:
                assert read(text)
            except ValueError as refusal:
                said(refusal, option)

    check()


@CASES
def test_tasks_of_slurm_are_understood_or_refused(cases: int) -> None:
    groups = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 5)), min_size=1, max_size=4)

    @repeat(cases, groups)
    def agrees(given: list[tuple[int, int]]) -> None:
        text = ",".join(f"{count}(x{times})" if times > 1 else str(count) for count, times in given)
        counts = [count for count, times in given for _ in range(times)]
        names = ",".join(f"n{i}" for i in range(len(counts)))
        environment = {"SLURM_JOB_NODELIST": names, "SLURM_TASKS_PER_NODE": text}
        [group] = slurm.tasks(environment, lambda listed: listed.split(","))
        assert [count for _, count in group] == counts

    agrees()


@CASES
def test_launchers_words_are_understood(cases: int) -> None:
    names = st.sampled_from(
        [
            *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
            *("TORCHELASTIC_USE_AGENT_STORE", "SLURM_STEP_NUM_TASKS", "PMI_SIZE"),
        ]
    )
    words = st.sampled_from(["--local_rank", "--local_rank=1", "--local-rank", "3", "--train.lr"])

    @repeat(cases, st.lists(words | st.text(max_size=4)), st.dictionaries(names, NUMBERS))
    def check(arguments: list[str], environment: dict[str, str]) -> None:
        found = launched(arguments, environment)
        assert not (found.by and found.leftover)
        rest = iter(arguments)
        assert all(word in rest for word in found.arguments)

    check()


@CASES
def test_payloads_are_decoded_or_are_no_numbers(cases: int) -> None:
    """Of whatever bytes: a message of the right shape; what a codec can't have written is NaN."""
    chosen = list(itertools.product(CODECS, ("row", "ue", "range")))

    @repeat(cases, st.sampled_from(chosen), st.integers(0, 2**32), st.booleans())
    def check(pair: tuple[str, str], drawn: int, noise: bool) -> None:
        name, scale = pair
        comm = CommSettings(scale=scale, topk=0.3)  # type: ignore[arg-type]  # hypothesis's
        one = codec.of_rows(name, comm, 3, 7, smashed=True)
        generator = torch.Generator().manual_seed(drawn)
        message = torch.rand(6, 7, generator=generator)
        payload = one.encode(message)
        whole = payload.view(torch.uint8)
        anything = torch.randint(0, 256, whole.shape, dtype=torch.uint8, generator=generator)
        if not noise:  # a few bytes only
            keep = torch.rand(whole.shape, generator=generator) < 0.9
            anything = torch.where(keep, whole, anything)
        found = one.decode(anything.view(payload.dtype))
        assert found.shape == message.shape
        assert found.is_floating_point()

    check()
