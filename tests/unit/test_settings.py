"""Settings: names, checks, presets, YAML there and back, DeepSpeed files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from csipipe.pipeline import settings as deepspeed
from csipipe.settings import commandline
from csipipe.settings.config import DataSettings, Settings, TopologySettings, TrainSettings

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


def parse(*arguments: str) -> Settings:
    return commandline.read(arguments)


def test_no_arguments_are_the_laptop_preset() -> None:
    laptop = parse("--config", str(ROOT / "launch" / "configs" / "laptop.yaml"))
    assert parse() == laptop == Settings()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_is_read(preset: Path) -> None:
    settings = parse("--config", str(preset), "--data.source", "csinet", "--data.path", "x")
    assert settings.data.path == "x"


def test_the_paper_preset_is_the_paper() -> None:
    paper = parse("--config", str(ROOT / "launch/configs/paper.yaml"), "--data.path", "x")
    assert (paper.topology.ues, paper.train.batch_size, paper.train.micro_batches) == (10, 800, 2)
    assert (paper.train.lr, paper.train.betas) == (8e-5, (0.9, 0.95))
    assert paper.train.lr_at(0) == paper.train.lr_at(19_999) == 8e-5
    assert (paper.data.train_samples, paper.data.test_samples) == (130_000, 20_000)


@pytest.mark.parametrize("folder", ["somewhere", "1e-3", "1.5e3"])
def test_yaml_goes_there_and_back(folder: str, tmp_path: Path) -> None:
    settings = parse("--model.c1", "64", "--train.betas", "[0.8, 0.9]", "--run.dir", folder)
    file = tmp_path / "config.yaml"
    file.write_text(commandline.to_yaml(settings))
    assert parse("--config", str(file)) == settings


def test_the_ends_of_a_range_are_in_it() -> None:
    train = TrainSettings(iterations=9, personal_iterations=9, betas=(0.0, 0.0), warmup=1.0, mu=0.0)
    assert train.lr_at(8) == train.lr
    assert TrainSettings(warmup=0.0).lr_at(0) == train.lr
    with pytest.raises(ValueError, match=r"train\.max_rms is nan"):
        TrainSettings(max_rms=math.nan)


def test_rates_are_of_encoder_tail_and_head() -> None:
    train = TrainSettings(rates=(1.0, 2.0, 3.0))
    assert [train.rate_of(part) for part in ("encoder", "tail", "head")] == [1, 2, 3]


def test_differences_are_those_of_both_sides() -> None:
    found, wanted = {"a": 1, "b": 2, "d": 4}, {"b": 2, "c": 3, "d": 5}
    assert list(commandline.differences(found, wanted)) == [
        ("c", None, 3),
        ("d", 4, 5),
        ("a", 1, None),
    ]


def test_later_arguments_win_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {lr: 1.0, seed: 7}")
    settings = parse("--config", str(file), "--train.lr", "0.5")
    assert (settings.train.lr, settings.train.seed) == (0.5, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.learning_rate", "1"], "train.learning_rate"),
        (["--train.iteration", "1"], r"iteration 1\nDid you mean --train\.iterations\?"),
        (["--methd=fedavg"], r"Did you mean --method\?"),
        (["--modls", "linear"], r"modls linear\nRun with --help"),
        (["--train.lr", "fast"], "train.lr"),
        (["--topology.ues", "2.5"], "topology.ues"),
        (["--method", "magic"], "magic"),
        (["--train.micro_batches", "5"], "32 is not divisible by train.micro_batches 5"),
        (["--train.micro_batches", "0"], "train.micro_batches is 0"),
        (["--topology.stages", "0"], "topology.stages is 0"),
        (["--topology.partition", "type:["], r"topology\.partition is 'type:\['; after type:"),
        (["--topology.partition", "halves"], "'halves'; expected uniform, parameters"),
        (
            ["--data.source", "csinet"],
            "csinet and data.path is null; csinet and files need a folder in it",
        ),
        (["--data.path", "x"], r"synthetic takes none \(null\)"),
        (["--data.holdout", "1"], r"must lie in \[0, 1\)"),
        (["--data.train_samples", "0"], "data.train_samples is 0"),
        (["--train.lr", ".inf"], "train.lr is inf"),
        (["--train.betas", "[0.9, 1.0]"], "train.betas"),
        (["--train.local_steps", "0"], "train.local_steps is 0"),
        (["--train.local_steps", "2"], "csilocal exchanges after every step"),
        (["--train.aggregate_every", "0"], "train.aggregate_every is 0"),
        (["--train.personal_iterations", "501"], "between 0 and train.iterations 500"),
        (
            ["--method", "fedgrad", "--train.local_steps", "2"],
            "leave it at 1, or use one of fedavg,",
        ),
        (["--train.mu", "-0.1"], "train.mu is -0.1"),
        (["--train.mu", ".inf"], "train.mu is inf"),
        (["--train.personalisation", "fedper"], "train.personalisation"),
        (["--run.timeout", "2.9"], "run.timeout is 2.9; it must be finite, and at least 3 s"),
        (["--run.timeout", ".inf"], "run.timeout is inf"),
        (["--run.resume", ""], "run.resume is empty"),
        (["--train.warmup", "2"], r"train.warmup is 2\.0; it must lie in \[0, 1\]"),
        (["--train.max_rms", ".nan"], "train.max_rms is nan; it must be a positive number"),
        (
            ["--data.environment=noniid", "--data.alpha=0"],
            r"data.alpha is 0\.0; it must be positive",
        ),
        (["--data.environment", "mars"], "'mars'; it must be one of indoor, outdoor, noniid"),
        (
            ["--method=fedavg", "--train.average=0.9", "--topology.participants=1"],
            "1 of 4 UEs, with method fedavg: a UE that takes no part has no mean",
        ),
        (["--config", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


def test_a_misspelt_key_in_a_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    (fine := tmp_path / "fine.yaml").write_text("train: {lr: 1.0}")
    for text in ("train: {learning_rate: 1.0}", "train: {lr: [1.0\n", "train: {lr: fast}", "csi"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"^\S*/mine\.yaml: ."):
            parse("--config", str(fine), f"--config={file}")


def test_the_rate_warms_up_and_decays() -> None:
    train = TrainSettings(iterations=100, lr=1.0, warmup=0.1)
    rates = [train.lr_at(k) for k in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[99] < 1e-3
    assert TrainSettings(iterations=1, lr=1.0).lr_at(0) == 1.0


def test_defaults_that_follow_from_others() -> None:
    assert Settings().stages == 2
    assert Settings(method="centralised").stages == 0
    assert Settings(method="fedproxper").stages == 1
    assert Settings(topology=TopologySettings(stages=3)).stages == 3
    assert Settings(train=TrainSettings(iterations=5)).eval_every == 1
    assert Settings(train=TrainSettings(iterations=500)).eval_every == 50
    assert Settings(train=TrainSettings(iterations=5)).save_every == 1
    assert Settings(train=TrainSettings(iterations=500)).save_every == 50
    assert math.isfinite(DataSettings().holdout)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_shipped_deepspeed_files_are_read(precision: Any) -> None:
    keys = deepspeed.load(None, precision)
    assert deepspeed.with_batches(keys, 32, 4)["train_batch_size"] == 128
    assert not set(deepspeed.BATCH_KEYS) & set(keys)


def test_every_deepspeed_file_switches_clipping_off() -> None:
    files = sorted((ROOT / "ds_configs").glob("*.json"))
    assert len(files) >= 3
    for file in files:
        assert json.loads(file.read_text())["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"gradient_clipping": 0.0, "train_batch_size": 8}', "'train_batch_size'"),
        ('{"gradient_clipping": 0.0, "gradient_accumulation_steps": 1}', "derives"),
        ('{"gradient_clipping": 0.0, "optimizer": {}}', "'optimizer'"),
        ("{}", "gradient_clipping None"),
        ('{"gradient_clipping": 1.0}', "gradient_clipping 1.0"),
        ('{"gradient_clipping": 0.0, "fp16": {"enabled": true}}', "enables fp16"),
        (
            '{"gradient_clipping": 0.0, "torch_autocast": {"enabled": true, "dtype": "bfloat16"}}',
            "computes in bf16, but train.precision is fp32",
        ),
        (
            '{"gradient_clipping": 0.0, "zero_optimization": {"stage": 2}}',
            "pipelines work with stages 0 and 1",
        ),
        ('{"gradient_clipping": 0.0, "zero_optimization": true}', "not an object"),
        ('{"gradient_clipping": 0.0, "bfloat16": {"enabled": true}}', "enables bfloat16"),
        (
            '{"gradient_clipping": 0.0, "zero_optimization": {"offload_optimizer": {}}}',
            "without offloading",
        ),
        (
            '{"gradient_clipping": 0.0, "communication_data_type": "fp16"}',
            "communication_data_type",
        ),
        ('{"gradient_clipping": 0.0, "activation_checkpointing": {}}', "activation_checkpointing"),
        (
            '{"gradient_clipping": 0.0, "flops_profiler": {"enabled": true}}',
            "sets .flops_profiler.",
        ),
        ('{"gradient_clipping": 0.0, "wall_clock_breakdown": true}', "takes false"),
        ('{"gradient_clipping": 0.0, "steps_per_print": 0}', "an integer above 0"),
        ('{"gradient_clipping": 0.0, "steps_per_print": 1.5}', "an integer above 0"),
        ('{"gradient_clipping": 0.0, "steps_per_print": {}}', "an integer above 0"),
        ('{"gradient_clipping": 0.0, "zero_optimization": {"stage": true}}', "takes 0 or 1"),
        (
            '{"gradient_clipping": 0.0, "torch_autocast": {"lower_precision_safe_modules": []}}',
            "lower_precision_safe_modules",
        ),
        ("{", "is not JSON"),
        ("[]", "no JSON object"),
    ],
)
def test_deepspeed_files_that_cannot_be_used(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        deepspeed.load(str(file), "fp32")


def test_a_missing_deepspeed_file_names_the_shipped_ones() -> None:
    with pytest.raises(FileNotFoundError, match="ds_configs"):
        deepspeed.load("nowhere.json", "fp32")


def test_an_unknown_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed, "version", lambda package: "9.9.9")
    with pytest.raises(ValueError, match=r"DeepSpeed 9\.9\.9 is installed; csipipe knows 0\.19\.8"):
        deepspeed.load(None, "fp32")


def test_stacking_is_for_csilocal() -> None:
    with pytest.raises(ValueError, match=r"train.stacked is always, but fedavg has no UEs whose"):
        Settings(method="fedavg", train=TrainSettings(stacked="always"))


def test_a_tilde_is_home_in_a_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "mine.yaml"
    file.write_text("run: {dir: ~/x, resume: ~/y}\ntrain: {deepspeed: ~/z.json}\n")
    found = parse("--config", str(file), "--run.dir=~/w")
    assert (found.run.dir, found.run.resume) == ("/home/me/w", "/home/me/y")
    assert found.train.deepspeed == "/home/me/z.json"


@pytest.mark.parametrize("text", ["train: {loss: null}", "comm: null", "comm: {codec: null}"])
def test_null_where_there_must_be_a_value_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"(train.loss|comm|comm.codec) is null; leave it out"):
        commandline.read(["--config", str(file)])
