"""Federated methods: worked out by hand, their identities, what crosses, where they run."""

from __future__ import annotations

import copy
import json
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same, difference
from harness import run_program, run_world
from runs import CPU, follow, joined, small, splits
from test_run import arguments
from torch import Tensor, nn

from csipipe import methods, models
from csipipe.comm import channel
from csipipe.comm.ledger import BUFFERS, COUNTED, PAPER, PHASES, Kind
from csipipe.comm.world import World
from csipipe.device import host_buffer
from csipipe.evaluation import testset
from csipipe.evaluation.samples import measure
from csipipe.evaluation.summary import Evaluated
from csipipe.methods.centralised import Centralised
from csipipe.methods.common import sizes
from csipipe.methods.cost import exchanged_per_iteration
from csipipe.methods.ue import UserEquipment
from csipipe.run import trained
from csipipe.settings import commandline
from csipipe.settings.config import Placement, Settings

FEDERATED: tuple[str, ...] = (
    "fedavg",
    "fedavgper",
    "fedprox",
    "fedproxper",
    "fedgrad",
    "fedgradper",
)


def federated(method: str, ues: int = 4, **train: Any) -> Settings:
    """Two iterations; two local steps where there are any, μ far from 0."""
    steps = 1 if "grad" in method else 2
    train = {"iterations": 2, "local_steps": steps, "mu": 2.0, "lr": 1e-2, **train}
    return small(method, topology={"stages": None, "ues": ues}, train=train)


RUNS = {method: federated(method) for method in FEDERATED} | {
    "fedavgper, FedAlt": federated("fedavgper", personalisation="fedalt"),
    "fedproxper, FedAlt": federated("fedproxper", personalisation="fedalt"),
    "fedgradper, FedAlt": federated("fedgradper", personalisation="fedalt"),
    "fedprox, mu 0": federated("fedprox", mu=0.0),
    "fedavg, 1 step": federated("fedavg", local_steps=1),
    "fedprox, 1 step": federated("fedprox", local_steps=1),
    "fedavg, bf16": federated("fedavg", precision="bf16"),
}


@cache
def found(
    ue_ranks: int = 2, *names: str, placement: Placement = "apart"
) -> dict[str, dict[str, Any]]:
    """Every run, or some, in one world."""
    runs = {name: RUNS[name] for name in names or RUNS}
    for name, run in runs.items():
        runs[name] = replace(run, topology=replace(run.topology, placement=placement))
    ranks = run_world(ue_ranks + (placement == "apart"), splits, runs)
    return {name: joined([rank[name] for rank in ranks]) for name in runs}


def whole_model(settings: Settings) -> nn.Sequential:
    """Encoder, tail and head, as they start."""
    model, seed = settings.model, settings.train.seed
    tail = nn.Sequential(*models.build_tail(model, seed))
    return nn.Sequential(models.build_encoder(model, seed), tail, models.build_head(model, seed))


class ByHand:
    """What `reading.md` says of the methods, in plain torch: no flat vectors, no wire, own Adam.

    `nets` are the UEs' models; names begin with the part: 0 encoder, 1 tail, 2 head.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.train = settings.train
        self.ues, _ = methods.load(settings, range(settings.topology.ues), CPU)
        net = whole_model(settings)
        torch.set_num_threads(1)
        self.start = net.state_dict()
        self.nets = [copy.deepcopy(net) for _ in self.ues]
        self.moments: list[dict[str, tuple[Tensor, Tensor, int]]] = [{} for _ in self.ues]
        first = "1" if settings.method.endswith("per") else "0"
        self.shared = [name for name in net.state_dict() if name[0] >= first]
        for k in range(self.train.iterations):
            self.iteration(self.train.lr_at(k))

    def phases(self) -> list[str]:
        """Parts that step together."""
        personal = self.settings.method.endswith("per")
        return ["0", "12"] if personal and self.train.personalisation == "fedalt" else ["012"]

    def iteration(self, lr: float) -> None:
        start = copy.deepcopy(self.nets[0].state_dict())
        if "grad" in self.settings.method:
            gradients = []
            for u in range(len(self.nets)):
                if len(self.phases()) == 2:
                    self.adam(u, self.gradient(u, "0"), lr)
                gradients.append(self.gradient(u, self.phases()[-1]))
            for name in [name for name in gradients[0] if name in self.shared]:
                mean = torch.stack([gradient[name] for gradient in gradients]).mean(0)
                for gradient in gradients:
                    gradient[name] = mean
            for u, gradient in enumerate(gradients):
                self.adam(u, gradient, lr)
        else:
            for u in range(len(self.nets)):
                for parts in self.phases():
                    for _ in range(self.train.local_steps):
                        gradient = self.gradient(u, parts)
                        if "prox" in self.settings.method:
                            for name, p in self.nets[u].named_parameters():
                                if name in gradient and name in self.shared:
                                    gradient[name] += self.train.mu * (p.detach() - start[name])
                        self.adam(u, gradient, lr)
        self.average()

    def gradient(self, u: int, parts: str) -> dict[str, Tensor]:
        """Of one mini-batch's mean loss, for the parameters of `parts`."""
        h = self.ues[u].batch(self.ues[u].draw(self.train.batch_size))
        error = (self.nets[u](h) - h).square().sum((1, 2, 3)) / h.square().sum((1, 2, 3))
        of = {name: p for name, p in self.nets[u].named_parameters() if name[0] in parts}
        return dict(zip(of, torch.autograd.grad(error.mean(), list(of.values())), strict=True))

    def adam(self, u: int, gradient: dict[str, Tensor], lr: float) -> None:
        beta1, beta2 = self.train.betas
        of = dict(self.nets[u].named_parameters())
        for name, g in gradient.items():
            m, v, t = self.moments[u].get(name, (torch.zeros(()), torch.zeros(()), 0))
            m, v, t = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g, t + 1
            self.moments[u][name] = m, v, t
            step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-8)
            of[name].data -= lr * step

    def average(self) -> None:
        """The mean of the shared parts, BatchNorm's running statistics among them."""
        states = [net.state_dict() for net in self.nets]
        for name in self.shared:
            if states[0][name].is_floating_point():
                mean = torch.stack([state[name] for state in states]).mean(0)
                for state in states:
                    state[name].copy_(mean)


# before a BatchNorm the bias's true gradient is zero; Adam makes steps of what is left, which is
# noise, and the running mean follows the bias
NOISE = ("0.0.bias", "0.1.running_mean")


def state_of(run: dict[str, Any], ue: int) -> dict[str, Tensor]:
    """What a run wrote of a UE's whole model, by the names of `whole_model`."""
    files: dict[str, dict[str, Tensor]] = run["files"]
    state = files["tail.safetensors"] | files[f"ue-{ue}.safetensors"]
    number = {"encoder": "0", "tail": "1", "head": "2"}
    return {
        f"{number[part]}.{name}": tensor
        for key, tensor in state.items()
        for part, _, name in [key.partition(".")]
    }


@pytest.mark.parametrize("name", [name for name in RUNS if "bf16" not in name])
def test_every_method_does_what_was_worked_out_by_hand(name: str) -> None:
    wanted = ByHand(RUNS[name])
    for ue, net in enumerate(wanted.nets):
        state = state_of(found()[name], ue)
        assert len(state) == len(net.state_dict())
        for part in "012":
            hand = {k: v for k, v in net.state_dict().items() if k[0] == part and k not in NOISE}
            difference, moved = (
                torch.cat([(a[key].double() - b[key]).flatten() for key in hand]).norm()
                for a, b in ((state, hand), (hand, wanted.start))
            )
            # Adam divides by the gradient's size: where that is nearly 0, rounding shows
            assert difference <= 1e-3 * moved, part


@pytest.mark.parametrize(
    ("ue_ranks", "placement"), [(1, "apart"), (4, "apart"), (1, "together"), (3, "together")]
)
def test_placement_changes_no_bit(ue_ranks: int, placement: Placement) -> None:
    names = "fedavg", "fedproxper, FedAlt", "fedgradper"
    for name, one in found(ue_ranks, *names, placement=placement).items():
        # the files have BatchNorm's statistics
        assert_same(one, found()[name], "losses", "evaluations", "parameters", "files", "ledger")


def test_fedprox_is_fedavg_without_a_proximal_term() -> None:
    runs = found()
    assert_same(runs["fedavg"], runs["fedprox, mu 0"], "parameters")
    assert_same(runs["fedavg, 1 step"], runs["fedprox, 1 step"], "parameters")
    assert difference(runs["fedavg"]["parameters"], runs["fedprox"]["parameters"])
    names = [name for name in RUNS if "prox" in name]
    bts, _ = run_world(2, notes, [RUNS[name] for name in names])
    said = [name for name, lines in zip(names, bts, strict=True) if "is FedAvg" in str(lines)]
    assert said == ["fedprox, 1 step"]


def notes(world: World, runs: list[Settings]) -> list[list[str]]:
    """What a rank says of each run before it trains."""
    builders = [methods.prepare(settings, world.rank, world.size, CPU) for settings in runs]
    world.ready("data")
    world.connect(20.0)
    found = [build(world).notes for build in builders]
    world.leave()
    return found


class ByUe(Centralised):
    """The centralised reference, which runs each UE's rows on their own as it trains."""

    def run(
        self, ues: list[UserEquipment], h_UBAD: list[Tensor], valid: list[int] | None = None
    ) -> Tensor:
        if not torch.is_grad_enabled():
            return super().run(ues, h_UBAD, valid)
        sums = [super(ByUe, self).run([ue], [h]) for ue, h in zip(ues, h_UBAD, strict=True)]
        for part in (self.tail, self.ues[0].encoder, self.ues[0].head):
            for parameter in part.parameters():
                assert parameter.grad is not None
                parameter.grad /= len(h_UBAD)
        return torch.cat(sums)


def test_fedgrad_is_centralised_training() -> None:
    settings = RUNS["fedgrad"]
    central = small("centralised", topology={"stages": None}, train=vars(settings.train))
    central = replace(central, train=replace(central.train, micro_batches=1))
    torch.set_num_threads(1)
    ues, test = methods.load(central, range(4), CPU)
    wanted, run = follow(ByUe(central, ues, test, CPU), 2), found()["fedgrad"]
    torch.testing.assert_close(
        torch.tensor(run["losses"]), torch.tensor(wanted["losses"]), rtol=1e-5, atol=0
    )
    for name, parameter in wanted["parameters"].items():
        if not name.endswith("encoder.0.bias"):
            mine = run["parameters"][name if name.startswith("ue") else f"ue-0.{name}"]
            assert (mine - parameter).norm() <= 1e-4 * parameter.norm(), name


def test_with_one_ue_every_method_is_centralised_training() -> None:
    """With the loss that isn't the one reported, too."""
    one = {
        method: replace(run, data=replace(run.data, kind="eigenvectors"))
        for method in FEDERATED
        for run in [federated(method, ues=1, local_steps=1, micro_batches=1, loss="sgcs")]
    }
    ranks = run_world(2, splits, one)
    model = one["fedavg"]
    central = replace(model, method="centralised", topology=replace(model.topology, stages=None))
    torch.set_num_threads(1)
    wanted = follow(Centralised(central, *methods.load(central, range(1), CPU), CPU), 2)
    for method in FEDERATED:
        run = joined([rank[method] for rank in ranks])
        for losses, others in zip(run["losses"], wanted["losses"], strict=True):
            assert losses == pytest.approx(others, rel=1e-5)
        for a, b in zip(run["evaluations"], wanted["evaluations"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def test_a_model_without_batchnorm_exchanges_no_statistics() -> None:
    run = federated("fedavg", ues=1, local_steps=1, micro_batches=1)
    run = replace(run, model=replace(run.model, name="linear"))
    found = joined([rank[""] for rank in run_world(2, splits, {"": run})])
    central = replace(run, method="centralised", topology=replace(run.topology, stages=None))
    torch.set_num_threads(1)
    wanted = follow(Centralised(central, *methods.load(central, range(1), CPU), CPU), 2)
    for losses, others in zip(found["losses"], wanted["losses"], strict=True):
        assert losses == pytest.approx(others, rel=1e-5)
    counts = found["ledger"].sum(dim=(0, 2))[..., 0]
    crossed = {kind for kind, scalars in zip(COUNTED, counts.tolist(), strict=True) if scalars}
    assert crossed == {Kind.UPDATE, Kind.MEAN_UPDATE}


def test_personal_encoders_stay_and_everything_else_is_one() -> None:
    for name, run in found().items():
        states = [state_of(run, ue) for ue in range(4)]
        for key in states[0]:
            alike = all(torch.equal(states[0][key], state[key]) for state in states[1:])
            personal = key.startswith("0") and "per" in name
            assert alike != personal or key.endswith("num_batches_tracked"), (name, key)
        tails = {key: p for key, p in run["parameters"].items() if ".tail." in key}
        for key, parameter in tails.items():
            assert torch.equal(parameter, tails["ue-0" + key[4:]]), (name, key)
    one, other = (found()[name]["parameters"] for name in ("fedavgper", "fedavgper, FedAlt"))
    assert difference(one, other)


def test_only_shared_parts_cross_and_statistics_are_counted_apart() -> None:
    for name, run in found().items():
        settings = RUNS[name]
        [training, evaluation] = run["ledger"]
        assert PHASES == ("training", "evaluation")
        assert not evaluation.any()
        parts = models.count_parts(settings.model)
        whole = parts["tail"] + parts["head"] + (0 if "per" in name else parts["encoder"])
        # running means and variances: two channels in the encoder, five layers of seven channels
        # and a last one of two in each of the tail's two CRBlocks
        apart = 2 * 2 * (5 * 7 + 2) + (0 if "per" in name else 2 * 2)
        for kind in (Kind.UPDATE, Kind.MEAN_UPDATE, Kind.STATISTICS, Kind.MEAN_STATISTICS):
            scalars = 2 * (apart if kind in BUFFERS else whole)
            size = scalars * (2 if "bf16" in name else 4)
            assert training[COUNTED.index(kind)].tolist() == [[scalars, size]] * 4
        paper = training[[COUNTED.index(kind) for kind in PAPER], :, 0].sum()
        assert paper == 2 * sum(exchanged_per_iteration(settings).values())


def most_alive(world: World, settings: Settings) -> int:
    """One rank; the most buffers for a UE's update that it had at a time."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def listen(shape: tuple[int, ...], *arguments: Any) -> Tensor:
        nonlocal most
        buffer = host_buffer(shape, *arguments)
        if len(shape) == 2 and shape[1] == sizes(settings)[Kind.UPDATE]:
            alive.add(buffer)
            most = max(most, len(alive))
        return buffer

    assert vars(channel)["host_buffer"] is host_buffer  # where buffers for messages are made
    vars(channel)["host_buffer"] = listen
    splits(world, {"": settings})
    return most


@pytest.mark.long
def test_the_aggregator_holds_no_more_of_more_ues() -> None:
    counts = {ues: run_world(2, most_alive, federated("fedavg", ues)) for ues in (2, 6)}
    assert [bts for bts, _ in counts.values()] == [2, 2]  # one that is added, one that comes
    assert [host for _, host in counts.values()] == [2, 6]


def test_bf16_changes_little() -> None:
    coarse, fine = found()["fedavg, bf16"], found()["fedavg"]
    torch.testing.assert_close(
        torch.tensor(coarse["losses"]), torch.tensor(fine["losses"]), rtol=3e-2, atol=0
    )


@pytest.mark.parametrize("name", ["fedavg", "fedproxper"])
def test_evaluation_is_the_mean_over_the_whole_test_set(name: str) -> None:
    run, settings = found()[name], RUNS[name]
    [_, test] = run["evaluations"]
    h = methods.load(settings, range(1), CPU)[1]
    for ue, sums in enumerate(test):
        net = whole_model(settings).eval()
        net.load_state_dict(state_of(run, ue))
        with torch.no_grad():
            error = (net(h) - h).square().sum((1, 2, 3)).double()
        power, centred = (x.square().sum((1, 2, 3)).double() for x in (h, h - 0.5))
        wanted = [error / power, error / centred, centred / power]
        means = [20, *(float(x.sum()) for x in wanted), 0]  # no SGCS of channels
        assert sums.tolist() == pytest.approx(means, rel=1e-5)


def test_a_measured_iteration_scales_up_to_the_papers_totals() -> None:
    times: dict[str, int] = {"csilocal": 1200, "fedavg": 560, "fedprox": 455}
    one_ue = {
        method: small(
            method,
            model={"c1": 512, "c2": 512, "angles": 32, "delays": 32},
            topology={"stages": 1, "ues": 1},
            train={"iterations": 1, "batch_size": 80, "micro_batches": 1},
        )
        for method in times
    }
    ledgers = {name: run["ledger"][0] for name, run in run_world(2, splits, one_ue)[0].items()}
    paper = [COUNTED.index(kind) for kind in PAPER]
    billions = {
        method: 10 * times[method] * int(ledgers[method][paper, :, 0].sum()) / 1e9
        for method in times
    }
    billions["csilocal"] *= 10  # a tenth of the paper's batch
    totals = {method: round(total, 4) for method, total in billions.items()}
    assert totals == {"csilocal": 19.6608, "fedavg": 47.0664, "fedprox": 38.2414}


def test_a_run_leaves_what_evaluate_reads(tmp_path: Path) -> None:
    given = arguments(tmp_path / "run", method="fedgradper")
    ranks = run_program(3, given)
    assert [rank.code for rank in ranks] == [0] * 3, ranks
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    settings = commandline.read(given)
    scalars = {way: 6 * n for way, n in exchanged_per_iteration(settings).items()}
    assert summary["exchanged"]["scalars"] == scalars
    assert summary["exchanged_buffers"]["scalars"]["up"] > 0
    assert "BatchNorm" in ranks[0].out
    torch.set_num_threads(1)
    run = trained.read(tmp_path / "run")
    rows = testset.load(settings)
    found = Evaluated(run, measure(run.models(), rows, "fp32", CPU))
    assert found.mean()["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)
    assert len({row["loss"] for row in summary["test"]["per_ue"]}) == 4
    best = tmp_path / "run" / "checkpoints" / "best"
    assert sorted(path.name for path in best.iterdir()) == [
        "tail.safetensors",
        *(f"ue-{n}.safetensors" for n in range(4)),
    ]
