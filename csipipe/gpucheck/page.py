"""The Markdown page of what was found."""

from __future__ import annotations

from typing import Any

_MARK = {True: "yes", False: "**no**", None: ""}


def page(title: str, steps: list[dict[str, Any]]) -> str:
    """One page.

    Args:
        steps: of each step, in order: `about`, `state`, `seconds`, `rows`, `texts`, `error`.
    """
    lines = [f"# {title}", ""]
    rows = [row for step in steps for row in step["rows"]]
    bad = [row for row in rows if row["ok"] is False]
    good = sum(row["ok"] is True for row in rows)
    failed = [
        step["about"] for step in steps if step["state"] not in ("done", "not run", "running")
    ]
    lines += [f"{good} checks hold, {len(bad)} don't; {len(failed)} steps ended early.", ""]
    lines += [f"- {row['what']}: {row['found']}, wanted {row['wanted']}" for row in bad]
    lines += [f"- {about}" for about in failed]
    for step in steps:
        lines += ["", f"## {step['about']}", "", f"{step['state']}, {step['seconds']:.0f} s", ""]
        if step["rows"]:
            lines += ["| | found | wanted | holds |", "|---|---|---|---|"]
            lines += [
                f"| {row['what']} | {row['found']} | {row['wanted']} | {_MARK[row['ok']]} |"
                for row in step["rows"]
            ]
        for text in (*step["texts"], step["error"]):
            if text:
                lines += ["", "```", text.rstrip(), "```"]
    return "\n".join(lines) + "\n"
