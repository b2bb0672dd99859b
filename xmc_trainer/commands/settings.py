"""List every setting: dotted name, default, domain of numbers, and meaning.

xmc-trainer settings
xmc-trainer settings | grep -A1 fan_in
"""

from __future__ import annotations

import argparse

from xmc_trainer.config.describe import settings_page
from xmc_trainer.config.fields import settings_of
from xmc_trainer.config.schema import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="print docs/settings.md")
    if parser.parse_args().markdown:
        print(settings_page())
        return
    for name, setting in settings_of(Config).items():
        domain = f"   in {setting.domain.text}" if setting.domain else ""
        print(f"{name} = {setting.default}{domain}\n    {setting.help}")
