"""Fuzzing: the same few hundred cases in every plain run, 10,000 others in a long one."""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

CASES = pytest.mark.parametrize("cases", [300, pytest.param(10_000, marks=pytest.mark.long)])
FEWER = pytest.mark.parametrize("cases", [60, pytest.param(10_000, marks=pytest.mark.long)])
"""Of what takes milliseconds each."""
DIGITS = b"0123456789"


def repeat(cases: int, *strategies: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Run a function on so many examples: the same ones every time in a plain run."""

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        setting: Any = settings(
            max_examples=cases,
            deadline=None,
            derandomize=cases < 10_000,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        examples: Any = given
        run: Callable[[], None] = setting(examples(*strategies)(function))
        return run

    return decorate


def said(refusal: Exception, name: str = "") -> None:
    """A refusal has a message, and names the file."""
    assert str(refusal)
    assert name in str(refusal), repr(refusal)


def seed(cases: int) -> int:
    """Of the damage: 0 in a plain run, another one in every long run; shown where a test fails."""
    chosen = 0 if cases < 10_000 else int.from_bytes(os.urandom(4), "big")
    print(f"seed {chosen}")
    return chosen


def damage(good: bytes, chance: random.Random, text: bool = False) -> bytes:
    """A file with a few bytes changed, mostly such as say something, cut off, or lengthened.

    Args:
        text: every other time, a digit becomes another one and nothing else.
    """
    bad = bytearray(good)
    if text and chance.random() < 0.5:
        bad[chance.choice([i for i, byte in enumerate(good) if byte in DIGITS])] = chance.choice(
            DIGITS
        )
        return bytes(bad)
    kind = chance.random()
    if kind < 0.15:
        return bytes(bad[: chance.randrange(len(bad))])
    if kind < 0.2:
        return bytes(bad) + chance.randbytes(chance.randrange(1, 200))
    saying = [i for i, byte in enumerate(good[:4000]) if byte]
    for _ in range(chance.randrange(1, 6)):
        where = chance.choice(saying) if chance.random() < 0.5 else chance.randrange(len(bad))
        bad[where] = chance.choice([0, 1, 127, 128, 255, bad[where] ^ 1, chance.randrange(256)])
    return bytes(bad)


def damaged(
    good: bytes,
    cases: int,
    file: Path,
    read: Callable[[], object],
    text: bool = False,
    named: bool = True,
) -> float:
    """Read that many damaged files; the share that was refused.

    Args:
        text: see `damage`.
        named: a refusal names the file.
    """
    chance = random.Random(seed(cases))
    return _refused((damage(good, chance, text) for _ in range(cases)), file, read, named)


def _refused(bad: Iterable[bytes], file: Path, read: Callable[[], object], named: bool) -> float:
    """Read each of these as the file; the share that was refused. What was found is kept."""
    refused = []
    for content in bad:
        file.write_bytes(content)
        try:
            read()
            refused.append(False)
        except (ValueError, OSError) as refusal:
            said(refusal, file.name if named else "")
            refused.append(True)
        except BaseException:
            print(f"found with {file.name}: {content[:2000]!r}")
            file.with_name("found").write_bytes(content)
            raise
    print(f"{sum(refused)} of {len(refused)} were refused")
    return sum(refused) / len(refused)


STRANGE = [None, True, -1, 0, 7, 2**70, 0.5, float("nan"), float("inf"), "", "x", "\ud800", "1e999"]
"""What may stand where something else is expected, besides lists and objects of it."""


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in JSON values, with each key of it."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def spoiled(good: str, chance: random.Random) -> str:
    """JSON with one to three of its values replaced, removed or moved elsewhere; now and then with
    bytes changed, see `damage`.
    """
    if chance.random() < 0.1:
        return damage(good.encode(), chance, text=True).decode("latin-1")
    content = [json.loads(good)]
    for _ in range(chance.randrange(1, 4)):
        found = list(places(content))
        where, key = chance.choice(found)
        kind = chance.random()
        if kind < 0.15 and where is not content:
            del where[key]
        elif kind < 0.3:
            inside, other = chance.choice(found)
            where[key] = json.loads(json.dumps(inside[other]))
        else:
            new = chance.choice(STRANGE)
            where[key] = chance.choice([new, new, [new], {"x": new}, [], {}])
    return json.dumps(content[0])


def respoiled(
    good: str,
    cases: int,
    file: Path,
    read: Callable[[], object],
    named: bool = True,
    examples: tuple[str, ...] = (),
) -> float:
    """Read a JSON file, spoiled that many times; the share that was refused.

    Args:
        named: a refusal names the file.
        examples: texts that were found to be troublesome.
    """
    chance = random.Random(seed(cases))
    texts = itertools.chain(examples, (spoiled(good, chance) for _ in range(cases)))
    return _refused((t.encode("utf-8", "surrogatepass") for t in texts), file, read, named)
