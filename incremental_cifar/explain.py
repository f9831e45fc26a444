"""What the settings mean, from the fields of `Config`: for `--explain KEY`, and as the table in cfg/README.md.

    python -m incremental_cifar.explain

writes the table, between the two comments there that mark its place; `make docs` calls it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import NoReturn

from incremental_cifar.command_line import OneLineArgumentParser, run_script
from incremental_cifar.config import FIELDS, REPOSITORY, TYPE_NAMES, check_key
from incremental_cifar.safe_files import around_block, write_file

README = REPOSITORY / "cfg" / "README.md"
BEGIN, END = "<!-- the table of keys: written by make docs -->\n", "<!-- end of the table of keys -->\n"


def described(key: str) -> tuple[str, str, str]:
    """A setting's type, unit and rule; its default, as JSON; its meaning. All in Markdown."""
    field = FIELDS[key]
    facts = field.metadata
    value = [TYPE_NAMES[field.type].removeprefix("an ").removeprefix("a "), facts.get("unit"), facts["rule"][1]]
    value += [f"only with `{facts['of']}`" if "of" in facts else "", "free" if "free" in facts else ""]
    meaning = [*([facts["method"]] if "method" in facts else []), facts["help"]]
    return ", ".join(filter(None, value)), json.dumps(field.default), ". ".join(meaning)


def table() -> str:
    """A row per setting, in Markdown."""
    rows = [f"| `{key}` | {value} | `{default}` | {meaning} |\n" for key in FIELDS for value, default, meaning in [described(key)]]
    return "| key | type, unit, rule | default | meaning |\n| --- | --- | --- | --- |\n" + "".join(rows)


class Explain(argparse.Action):
    """Print what these settings mean, or with "all" every one, and end the process. Raises UserError for an unknown key."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Sequence[str], option_string: str | None = None
    ) -> NoReturn:
        keys = list(FIELDS) if values == ["all"] else values
        for key in keys:
            check_key(key, "--explain")
        for key in keys:
            value, default, meaning = described(key)
            print(f"{key}: {value}; default {default}\n    {meaning}".replace("`", ""), flush=True)
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table into cfg/README.md. Raises UserError unless both of its marks are there, once and in this order."""
    OneLineArgumentParser(description="Write the table of keys in cfg/README.md.").parse_args(arguments)
    before, _, after = around_block(README, BEGIN, END)
    write_file(README, before + table().encode() + after)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
