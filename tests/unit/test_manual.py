"""The pages of --help: each fits a screen, and together they have every setting."""

from __future__ import annotations

import pytest

from csipipe.settings import commandline, manual
from csipipe.settings.config import Settings

SCREEN = 70
"""Lines of a high screen, and 100 columns."""


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as left:
        commandline.settings(commandline.parser("what it does"), arguments)
    assert left.value.code == 0
    return capsys.readouterr().out


def test_the_first_page_fits_a_screen_and_names_every_section(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "--train.lr", "1e-3", "--help")
    assert len(text.splitlines()) <= SCREEN
    assert "what it does" in text
    for name in manual.SECTIONS:
        assert f"\n  {name} " in text
    assert "--method csilocal" in text
    assert "--train.lr" not in text


def test_every_setting_is_on_the_page_of_its_section(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = commandline.plain(Settings())
    for name in manual.SECTIONS:
        text = printed(capsys, "--help", name)
        lines = text.splitlines()
        assert len(lines) <= SCREEN
        assert max(map(len, lines)) <= 100
        for key in commandline.dotted(defaults[name]):
            assert f"  --{name}.{key} " in text


def test_a_page_gives_default_meaning_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(printed(capsys, "--help=train").split())
    assert "--train.lr 0.002 Adam's (peak) learning rate" in text
    assert "--train.threads null CPU threads per rank" in text
    assert "One of auto, cpu, cuda." in text
    assert "One of gpipe" not in text  # the sentence names them all


def test_all_is_every_setting_that_has_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "-h", "all")
    for key in commandline.dotted(commandline.plain(Settings())):
        assert f"  --{key} " in text or key == "debug"


def test_a_parser_parses_more_than_once() -> None:
    parser = commandline.parser("")
    rates = [commandline.settings(parser, [f"--train.lr={lr}"])[0].train.lr for lr in (1, 2)]
    assert rates == [1.0, 2.0]


def test_a_section_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="no section 'nosuch'; expected model, topology"):
        commandline.settings(commandline.parser(""), ["--help", "nosuch"])
