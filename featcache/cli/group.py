"""The group of all verbs: errors become one line and an exit code, once for all of them."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from typing import Any, NoReturn

import click

from featcache.disk import keep_standard_streams
from featcache.errors import FeatcacheError
from featcache.processors import prefer_wide_kernels
from featcache.tuning.launched import tells_for_machine

DONE_WITH_SKIPS = 3


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C but for the exit code."""


def _terminate(signum: int, frame: object) -> NoReturn:
    raise _Terminated


class _OnceEach(click.Command):
    """Refuses a second value for an option that takes one: the first would be dropped without a word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        *_, order = self.make_parser(ctx).parse_args(args=list(args))
        options = [one for one in order if isinstance(one, click.Option)]
        given = [one for one in options if not one.multiple and not one.is_flag]
        twice = [one.opts[-1] for one, times in Counter(given).items() if times > 1]
        if twice and not ctx.resilient_parsing:
            raise click.UsageError(f"{twice[0]} takes one value, and is given more than once.", ctx)
        return super().parse_args(ctx, args)


class _Verbs(click.Group):
    """Turns what is known into one line and an exit code, once for all commands."""

    command_class = _OnceEach

    def invoke(self, ctx: click.Context) -> Any:
        prefer_wide_kernels()
        keep_standard_streams()
        signal.signal(signal.SIGTERM, _terminate)
        try:
            _require_folder()
            return super().invoke(ctx)
        except FeatcacheError as exc:
            if not exc.told_elsewhere:
                _say_lines(f"Error: {exc}", exc)
            ctx.exit(1)
        except click.UsageError as exc:
            if tells_for_machine():
                raise
            ctx.exit(exc.exit_code)
        except KeyboardInterrupt as exc:
            _say_lines("Interrupted.", exc)
            ctx.exit(143 if isinstance(exc, _Terminated) else 130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _require_folder() -> None:
    try:
        os.getcwd()
    except OSError as exc:
        raise FeatcacheError(
            f"the current folder cannot be found ({exc.strerror}): go to another one."
        ) from exc


def _say_lines(first: str, exc: BaseException) -> None:
    click.echo("\n".join([first, *(f"  {note}" for note in getattr(exc, "__notes__", ()))]), err=True)


def emit(result: Any, *, as_json: bool) -> None:
    text = json.dumps(result.to_json(), allow_nan=False) if as_json else result.describe()
    try:
        click.echo(text)
    except BrokenPipeError:
        raise  # click ends quietly when nobody reads on
    except OSError as exc:
        raise FeatcacheError(
            f"all is done, but the answer cannot be written: {exc.strerror}. Say where to with `> FILE`."
        ) from exc


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="featcache")
def main() -> None:
    """Embed an image data set once with a frozen backbone; train heads on the cached features in seconds.

    \b
    featcache embed photos/ -o photos.h5 --backbone resnet18
    featcache fit photos.h5 -o photos.model
    featcache predict photos.model new/*.jpg
    """
