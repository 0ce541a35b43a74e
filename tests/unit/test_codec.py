"""Codecs: what is decoded is near what was encoded, to the bit as long as announced, and NaN where
a payload makes no sense."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
import torch

from csipipe.comm import codec, trust
from csipipe.comm.channel import SLOTS, Channel, Peer
from csipipe.comm.codec import Codec, Residual, Rounding
from csipipe.comm.ledger import Kind
from csipipe.comm.loopback import Loopback
from csipipe.settings.config import CodecSettings, CommSettings, Settings, TrainSettings, suited
from csipipe.settings.tables import CODECS, CodecSpec

PACKED = [name for name, spec in CODECS.items() if spec.dtype is None]
LEVELS = [name for name, spec in CODECS.items() if spec.bits is not None]


def message(rows: int = 6, width: int = 37) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bits", [0, 1, 3, 16])
def test_bits_that_make_no_levels_or_fill_no_byte_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits of a codec is {bits}; it must be 2, 4 or 8"):
        CodecSpec(bits=bits)


def test_a_type_and_bits_together_are_refused() -> None:
    with pytest.raises(ValueError, match="has dtype 'float32' and bits 8, but"):
        CodecSpec(dtype="float32", bits=8)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float64", "half"])
def test_a_type_that_cannot_cross_is_refused(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype of a codec is '{dtype}'; it must be float32, bfl"):
        CodecSpec(dtype=dtype)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", ["row", "ue"])
def test_a_message_keeps_its_shape_and_has_the_length_announced(name: str, scale: str) -> None:
    comm = CommSettings(scale=scale, topk=0.3)  # type: ignore[arg-type]  # pytest's is a string
    for one, sent in (
        (codec.of_rows(name, comm, 3, 37), message()),  # odd widths, too
        (codec.of_vector(name, comm, 1003), message(1, 1003)),
    ):
        payload = one.encode(sent)
        assert payload.shape == one.shape(tuple(sent.shape))
        assert payload.dtype == one.dtype
        assert one.decode(payload).shape == sent.shape


@pytest.mark.parametrize(("name", "highest"), [("int8", 127), ("int4", 7), ("int2", 1)])
@pytest.mark.parametrize("scale", ["row", "ue"])
def test_levels_are_off_by_half_a_step_at_most(name: str, highest: int, scale: str) -> None:
    comm = CommSettings(scale=scale)  # type: ignore[arg-type]
    sent = message()
    sent[1] *= 100  # rows of one UE that differ
    sent[2] = 0
    one = codec.of_rows(name, comm, 3, 37)
    found = one.decode(one.encode(sent))
    groups = sent.view(2, -1) if scale == "ue" else sent
    step = (groups.abs().amax(1, keepdim=True) / highest).expand_as(groups).reshape(sent.shape)
    assert ((found - sent).abs() <= step * 0.5001).all()
    assert (found[2] == 0).all()
    largest = groups.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(
        found.view_as(groups).gather(1, largest), groups.gather(1, largest), rtol=1e-6, atol=0
    )


def test_a_payload_by_hand() -> None:
    one = codec.of_rows("int4", CommSettings(), 1, 3)
    payload = one.encode(torch.tensor([[7.0, -7.0, 2.4]]))
    # levels 14, 0, 9, with padding to 8 of them; byte j holds levels j and j + 4
    assert payload.tolist() == [[14, 0, 9, 0, *torch.tensor([1.0]).view(torch.uint8).tolist()]]
    assert one.decode(payload).tolist() == [[7.0, -7.0, 2.0]]
    short = codec.of_vector("int8", CommSettings(), 10)  # a group may be shorter than 256
    assert short.shape((1, 10)) == (1, 12 + 4)


def test_the_largest_cross_with_their_places() -> None:
    one = codec.of_rows("topk", CommSettings(topk=0.4), 2, 5)
    sent = torch.tensor([[1.0, -9, 2, 8, 3], [0, 0, 5, -6, 1]])
    assert one.decode(one.encode(sent)).tolist() == [[0, -9, 0, 8, 0], [0, 0, 5, -6, 0]]
    assert one.shape((2, 5)) == (1, 4 * 2 + 4 * 4)
    rounded = codec.of_rows("topk", CommSettings(topk=0.3), 1, 9)  # 3 of 9; whole words of four
    assert rounded.shape((1, 9)) == (1, 8 + 3 * 4)
    long = codec.of_vector("topk", CommSettings(topk=0.001), 100_000)
    vector = torch.zeros(1, 100_000)
    vector[0, 99_999] = 3  # a place that needs more than two bytes
    assert torch.equal(long.decode(long.encode(vector)), vector)


def bits_of(name: str, width: int) -> Codec:
    return codec.of_rows(name, CommSettings(topk=0.5), 2, width)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_arrives_as_none(name: str, value: float) -> None:
    sent = message(2, 8)
    sent[1, 3] = value
    one = bits_of(name, 8)
    assert not trust.sound(one.decode(one.encode(sent)), 1e30)


@pytest.mark.parametrize("name", PACKED)
def test_a_payload_cut_short_or_of_random_bytes_is_unsound_or_harmless(name: str) -> None:
    one = bits_of(name, 8)
    whole = one.encode(message(2, 8))
    marked = torch.zeros_like(whole)
    trust.mark(marked)
    for length in range(whole.shape[1] - 4):
        short = marked.clone()
        short[:, :length] = whole[:, :length]
        assert not trust.sound(one.decode(short), 1e4), length
    assert trust.sound(one.decode(whole), 1e4)
    noise = torch.randint(256, (300, *whole.shape), dtype=torch.uint8)
    for payload in noise:
        one.decode(payload)  # never an error


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_scales_that_are_no_scales_are_found(bad: float) -> None:
    one = bits_of("int8", 8)
    payload = one.encode(message(2, 8))
    payload[0, -8:-4] = torch.tensor([bad]).view(torch.uint8)  # the first of two
    assert not trust.sound(one.decode(payload), 1e4)


def test_places_outside_are_found() -> None:
    one = bits_of("topk", 8)
    payload = one.encode(message(2, 8))
    payload[0, 0] = 8
    assert not trust.sound(one.decode(payload), 1e4)


@pytest.mark.parametrize("name", LEVELS)
def test_stochastic_rounding_is_right_in_the_mean(name: str) -> None:
    one = codec.of_rows(name, CommSettings(), 1, 16)
    sent, rounding = message(1, 16), Rounding(3, stochastic=True)
    found = []
    for iteration in range(1000):
        rounding.iteration = iteration
        found.append(one.decode(one.encode(sent, rounding.noise(1, 0, [4], 16))))
    off = torch.stack(found).mean(0) - sent
    step = sent.abs().max() / (2 ** (CODECS[name].bits or 0) // 2 - 1)
    assert (off.abs() < 0.1 * step).all()  # six standard errors, of at most step/2 each
    nearest = one.decode(one.encode(sent)) - sent
    assert (nearest.abs() > 0.1 * step).any()


@pytest.mark.parametrize("name", LEVELS)
def test_no_rounding_takes_the_largest_of_a_group_beyond_the_levels(name: str) -> None:
    """A level of -128 would be read as +128."""
    one = codec.of_rows(name, CommSettings(), 1, 1)  # x / scale may be an ulp above the highest
    for sign, noise in ((-1, 0.0), (1, 1 - 2**-24)):
        sent = sign * message(2000, 1).abs()
        found = one.decode(one.encode(sent, torch.full_like(sent, noise)))
        torch.testing.assert_close(found, sent, rtol=1e-6, atol=0)


def test_rounding_and_noise_draw_from_generators_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seeds: list[int] = []
    seeded = torch.Generator.manual_seed

    class Noted(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            seeds.append(seed)
            return seeded(self, seed)

    monkeypatch.setattr(torch, "Generator", Noted)
    one = Rounding(3, stochastic=True)
    for one.iteration in range(4):
        one.noise(1, 0, [0, 1], 5)
        one.blur(torch.ones(2, 5), 0.5, 1, 0, [0, 1])
    assert len(seeds) == len(set(seeds)) == 16


def test_noise_depends_on_kind_iteration_micro_batch_and_ue_alone() -> None:
    one, other = (Rounding(3, stochastic=True) for _ in range(2))
    assert one.noise(1, 0, [0], 5) is None  # evaluation
    one.iteration = other.iteration = 7
    both = one.noise(1, 2, [0, 1], 5)
    alone = other.noise(1, 2, [1], 5)
    assert both is not None
    assert alone is not None
    assert torch.equal(both[1:], alone)
    drawn = [alone, both[:1], one.noise(2, 2, [1], 5), one.noise(1, 3, [1], 5)]
    one.iteration = 8
    drawn.append(one.noise(1, 2, [1], 5))
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn) if a is not None and b is not None)


def test_gaussian_noise_is_a_ues_own_and_the_same_in_every_evaluation() -> None:
    one, other = (Rounding(3, stochastic=False) for _ in range(2))
    message = torch.tensor([[1.0], [-3.0]]).expand(2, 20_000)
    evaluated = one.blur(message, 0.5, 1, 0, [0, 1])
    assert torch.equal(evaluated[1:], other.blur(message[1:], 0.5, 1, 0, [1]))
    added = evaluated - message
    torch.testing.assert_close(added.std(1), torch.tensor([0.5, 1.5]), atol=0, rtol=0.02)
    assert abs(float((added[0] * added[1]).mean())) < 0.03
    one.iteration = 0
    assert not torch.equal(one.blur(message, 0.5, 1, 0, [0, 1]), evaluated)


def test_noise_is_added_before_the_codec_in_proportion_to_what_is_sent() -> None:
    peer = Peer(0, slice(0, 6), (4, 5), loop=Loopback())
    for name in ("fp32", "int8"):
        one = Channel(
            Kind.SMASHED,
            [peer],
            (6, 5000),
            1,
            codec.of_rows(name, CommSettings(), 3, 5000),
            torch.device("cpu"),
        )
        one.noise = 0.5
        sent = message(6, 5000)
        sent[3:] *= 10  # UE 5
        one.post()
        one.send(0, sent)
        off = one.receive(0) - sent
        for rows, wanted in ((off[:3], 0.5), (off[3:], 5.0)):
            assert float(rows.square().mean().sqrt()) == pytest.approx(wanted, rel=0.05)
            assert not torch.equal(rows[0], rows[1])


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (math.nan, r"holds nan in 8 of 24 scalars, first at scalar 16 \(its last scale: it may"),
        (1e30, "has root mean square"),
    ],
)
def test_a_ue_whose_scale_is_none_is_named(bad: float, text: str, tolerant: bool) -> None:
    loop = Loopback()
    peer = Peer(0, slice(0, 6), (4, 5), "UE rank 1 (UEs 4-5)", loop)
    one = codec.of_rows("int8", CommSettings(), 3, 8)
    channel = Channel(Kind.SMASHED, [peer], (6, 8), 1, one, torch.device("cpu"), limit=1e4)
    channel.tolerant = tolerant
    payload = one.encode(message(6, 8))
    payload[1, -4:] = torch.tensor([bad]).view(torch.uint8)
    channel.post()
    loop.isend(payload, Kind.SMASHED.value * SLOTS)
    if tolerant:
        found = channel.receive(0)
        assert re.search(f"smashed data from UE 5 .* {text}", channel.bad[5])
        assert (found[3:] == 0).all()
        assert torch.equal(found[:3], one.decode(payload)[:3])  # UE 4's
    else:
        with pytest.raises(trust.BadMessage, match=f"smashed data from UE 5 .* {text}"):
            channel.receive(0)


def test_a_message_to_the_rank_itself_has_the_agreed_length() -> None:
    """Its buffer needs no mark: one row would otherwise be copied into all."""
    loop = Loopback()
    rows = torch.zeros(6, 8)
    received = loop.irecv(rows, 1)
    loop.isend(message(1, 8), 1)
    with pytest.raises(AssertionError, match="1, 8"):
        received.wait()


def test_what_is_lost_comes_with_the_next_message() -> None:
    one, residual = codec.of_vector("topk", CommSettings(topk=0.25), 4), Residual(4)
    arrived = torch.zeros(1, 4)
    sent = torch.tensor([[4.0, 3, 2, 1]])
    for _ in range(12):
        wanted = residual.add(sent)
        found = one.decode(one.encode(wanted))
        residual.keep(wanted, found)
        arrived += found
    torch.testing.assert_close(arrived + residual.value, 12 * sent)
    assert (arrived > 0).all()
    before = residual.value.clone()
    residual.keep(torch.full((1, 4), math.nan), sent)
    assert torch.equal(residual.value, before)


def test_a_channel_makes_up_for_what_is_lost_in_training_alone() -> None:
    peer = Peer(0, slice(0, 1), (4,), loop=Loopback())
    one, rounding = codec.of_vector("int2", CommSettings(), 4), Rounding(0, stochastic=False)
    cpu = torch.device("cpu")
    channel = Channel(Kind.UPDATE, [peer], (1, 4), 1, one, cpu, rounding=rounding)
    channel.residual = Residual(4)
    sent = torch.tensor([[4.0, 3, 1, 0.5]])

    def arrived() -> torch.Tensor:
        channel.post()
        channel.send(0, sent)
        return channel.receive(0).clone()

    total = torch.zeros(1, 4)
    for rounding.iteration in range(12):
        total += arrived()
    lost = channel.residual.value.clone()
    torch.testing.assert_close(total + lost, 12 * sent)
    assert lost.any()
    rounding.iteration = None
    torch.testing.assert_close(arrived(), one.decode(one.encode(sent)))
    assert torch.equal(channel.residual.value, lost)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CodecSettings(smashed="int3"), "comm.codec.smashed is 'int3'; it must be one of"),
        (lambda: CommSettings(noise=-0.1), "comm.noise is -0.1; it must be finite and at least 0"),
        (
            lambda: Settings(method="fedavg", comm=CommSettings(noise=0.1)).check_comm(),
            "comm.noise is 0.1, but fedavg exchanges no smashed data",
        ),
        (lambda: CommSettings(topk=0.0), r"comm.topk is 0.0; it must lie in \(0, 1\]"),
        (
            lambda: Settings(comm=CommSettings(codec=CodecSettings(update="int8"))).check_comm(),
            "comm.codec.update is int8, but csilocal exchanges smashed, output",
        ),
        (
            lambda: Settings(comm=CommSettings(error_feedback=True)).check_comm(),
            "comm.error_feedback is true, but csilocal sends no updates",
        ),
        (
            lambda: Settings(train=TrainSettings(aggregate_every=5)).check_comm(),
            "train.aggregate_every is 5, but csilocal has no iterations.*use splitfed",
        ),
        (
            lambda: Settings(
                method="fedavg", train=TrainSettings(personal_iterations=5)
            ).check_comm(),
            "train.personal_iterations is 5, but fedavg has no",
        ),
        (
            lambda: Settings(
                method="splitfed",
                comm=CommSettings(scale="range", codec=CodecSettings(smashed="int8")),
            ).check_comm(),
            "comm.scale is range, but splitfed averages encoders",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_another_method_has_no_period_and_no_ranges() -> None:
    train = TrainSettings(aggregate_every=5, personal_iterations=2)
    ranged = CommSettings(scale="range", codec=CodecSettings(smashed="int8"))
    sections = vars(Settings(method="splitfed", train=train))
    assert suited("splitfed", sections)["train"] == train
    assert suited("csilocal", sections)["train"] == TrainSettings()
    assert suited("splitfed", vars(Settings(comm=ranged)))["comm"].scale == "row"


def test_another_method_takes_what_is_its_own() -> None:
    codecs = CodecSettings(smashed="int8", update="int4")
    sections = vars(Settings(comm=CommSettings(codec=codecs, error_feedback=True, noise=0.5)))
    split, federated = (suited(method, sections)["comm"] for method in ("csilocal", "fedavg"))
    assert (split.codec, split.error_feedback) == (CodecSettings(smashed="int8"), False)
    assert (federated.codec, federated.error_feedback) == (CodecSettings(update="int4"), True)
    assert (split.noise, federated.noise) == (0.5, 0)
