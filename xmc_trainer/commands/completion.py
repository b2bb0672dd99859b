"""Print a script with which bash and zsh complete commands, options, settings and their choices.

xmc-trainer completion bash > ~/.local/share/bash-completion/completions/xmc-trainer
xmc-trainer completion zsh > ~/.xmc-trainer.zsh && echo 'source ~/.xmc-trainer.zsh' >> ~/.zshrc

Start a new shell afterwards. Write the file again after an update of xmc_trainer. Without the package bash-completion, write
a line `source FILE` into ~/.bashrc.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress

from xmc_trainer.commands.cli import COMMANDS
from xmc_trainer.config import Config, shipped_configs
from xmc_trainer.config.fields import settings_of

# `line` is what stands before the word under the cursor, `word` that word. bash splits words at "=" as well, and wants only the
# part behind it. A blank follows a complete word, and none the "=" of a setting.
_SCRIPT = """\
_xmc_trainer() {
    local line word words="" settings="%s"
    [[ ${COMP_WORDS[COMP_CWORD]-} == *[[:blank:]]* ]] && return  # quoted: only a file's name
    line="${COMP_LINE:0:$COMP_POINT}"
    word="${line##*[[:blank:]]}"
    line="${line%%"$word"}"
    case "$line" in
%s
    esac
    case "$word" in
%s
    esac
    COMPREPLY=($(compgen -W "$words" -- "$word"))
    COMPREPLY=("${COMPREPLY[@]/%%/ }")
    COMPREPLY=("${COMPREPLY[@]/%%= /=}")
    [[ $word == *=* && ${COMP_WORDBREAKS-} == *=* ]] && COMPREPLY=("${COMPREPLY[@]#*=}")
    return 0
}
complete -o nospace -o default -F _xmc_trainer xmc-trainer"""
_STARTS = {"bash": "", "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=_STARTS)
    start = _STARTS[parser.parse_args().shell]
    settings = " ".join(f"{name}=" for name in settings_of(Config))
    print(start + _SCRIPT % (settings, "\n".join(_of_commands()), "\n".join(_of_choices())))


def _of_commands() -> Iterator[str]:
    """Yield for each command, longest names first, the case of its options and settings; at last that of the commands."""
    for name in sorted(COMMANDS, key=len, reverse=True):
        help_text = _help_of(name)
        words = ["--help", *re.findall(r"^ +(?:-\w(?: \S+)?, )?(--[\w-]+)", help_text, re.MULTILINE)]
        yield _case(
            f'*"xmc-trainer {name} "*', [*dict.fromkeys(words), *(["$settings"] if "key=value" in help_text else [])]
        )
    yield _case(
        '*"xmc-trainer bench "*', [name.removeprefix("bench ") for name in COMMANDS if name.startswith("bench ")]
    )
    yield _case("*", [*dict.fromkeys(name.split()[0] for name in COMMANDS), "--help", "--version"])


def _help_of(command: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out), suppress(SystemExit):
        sys.argv = [f"xmc-trainer {command}", "--help"]
        importlib.import_module(COMMANDS[command][0]).main()
    return out.getvalue()


def _of_choices() -> Iterator[str]:
    """Yield for each setting with choices the case of its values."""
    yield _case("dataset=*", [f"dataset={name}" for name in sorted(shipped_configs())])
    for name, setting in settings_of(Config).items():
        if choices := ("true", "false") if setting.type is bool else setting.choices:
            yield _case(f"{name}=*", [f"{name}={choice}" for choice in choices])


def _case(pattern: str, words: list[str]) -> str:
    return f'        {pattern}) words="{" ".join(words)}" ;;'
