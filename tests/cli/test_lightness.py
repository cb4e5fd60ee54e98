"""Help answers at once, and no verb has too many flags."""

import subprocess
import sys

import typer

from twostep.cli import app

MAX_FLAGS = 12
MORE_FLAGS = {"cache": 20, "generate": 15, "edit": 14}
"""People's data differ in columns, sizes, weights and words, and have no recipe to say so in. How
long a clip is differs from wish to wish as its size does, and neither can say the other.
"""


def test_help_does_not_load_torch() -> None:
    code = """
import sys
from typer.testing import CliRunner
from twostep.cli import app
for arguments in (["--help"], ["generate", "--help"], ["recipes"]):
    assert CliRunner().invoke(app, arguments).exit_code == 0
print([name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == "[]", answer.stderr


def verbs(group):
    for command in group.commands.values():
        yield from verbs(command) if hasattr(command, "commands") else [command]


def test_verbs_have_few_flags_and_each_explains_itself() -> None:
    for verb in verbs(typer.main.get_command(app)):
        flags = [parameter for parameter in verb.params if parameter.param_type_name == "option"]
        assert len(flags) <= MORE_FLAGS.get(str(verb.name), MAX_FLAGS), verb.name
        assert verb.help, verb.name
        assert all(parameter.help for parameter in verb.params), verb.name
