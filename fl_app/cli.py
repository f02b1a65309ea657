"""The ``fl-app`` command.

Exit code 0: done; 2: a configuration or input that cannot be run; 1: anything else. Hydra is
loaded before torch is, and neither for ``--help``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fl_app.certs_cli import certs_cli
from fl_app.gateway_cli import gateway
from fl_app.ledger_cli import ledger_cli
from fl_app.site_cli import site_cli

if TYPE_CHECKING:
    from omegaconf import DictConfig

LAUNCHED_AT = time.time()

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated learning on Flower: one app for simulation and deployment.",
)
cli.add_typer(ledger_cli, name="ledger")
cli.add_typer(site_cli, name="site")
cli.add_typer(certs_cli, name="certs")
cli.command()(gateway)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
_JSON = Annotated[
    bool,
    typer.Option("--json", help="Print the summary alone, as JSON; in a sweep a line for each."),
]


@cli.command(context_settings=_PASS_ON)
def run(context: typer.Context, as_json: _JSON = False) -> None:
    """Run a federation, as in fl-app run task=digits strategy=fedprox rounds=20.

    Takes Hydra's overrides and flags: -m for sweeps, --cfg job to print the configuration,
    --config-dir DIR for configurations of your own, resume=RUN_DIR to go on with a run.
    """
    resumed = _resumed(context.args)
    if resumed is None:
        _run_with_hydra(context.args, as_json=as_json)
    else:
        _play(resumed, as_json=as_json, launched_at=LAUNCHED_AT)


@cli.command(context_settings=_PASS_ON)
def check(context: typer.Context, as_json: _JSON = False) -> None:
    """Compose and build a configuration, and say what would run, without running it."""
    from fl_app.plan import describe_plan, print_plan

    plan = describe_plan(_resumed(context.args) or _composed(context.args))
    if as_json:
        typer.echo(json.dumps(plan, indent=2))
    else:
        print_plan(plan)


@cli.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html anew from the other files of a run's folder."""
    from fl_app.tracking.report import write_report

    typer.echo(write_report(run_dir))


def main() -> None:
    """Run the command line, and turn errors into messages and exit codes."""
    sys.exit(_main(sys.argv[1:]))


def _main(arguments: Sequence[str]) -> int:
    show_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra hides the exception behind a print and an exit unless told otherwise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        # Click answers Ctrl-C with a number instead of an exception.
        if cli(list(arguments), standalone_mode=False):
            return _fail("interrupted before the run began.", 1)
        return 0
    except Exception as error:
        code, message = _describe(error)
        if message is None or show_traceback:
            raise
        return _fail(message, code)
    finally:
        if not show_traceback:
            del os.environ["HYDRA_FULL_ERROR"]


def _fail(message: str, code: int) -> int:
    typer.echo(f"Error: {message}", err=True)
    return code


def _describe(error: Exception) -> tuple[int, str | None]:
    """Return the exit code and the message of an error; no message if it is a fault of ours."""
    import click
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from fl_app.errors import ConfigError, FlAppError
    from fl_app.run_config import explain

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__cause__
    if cause is not None:
        return 2, str(cause)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return 2, explain(error)
    if isinstance(error, click.ClickException):
        return 2, error.format_message()
    if isinstance(error, FlAppError):
        return 1, str(error)
    if isinstance(error, ValueError) and _raised_by("hydra", error):
        return 2, f"{error}: choose a group's file by its name, such as task=digits."
    if isinstance(error, YAMLError | UnicodeDecodeError):
        return 2, f"a YAML file cannot be read: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and error.filename is not None:
        return 2, (
            f"{error.filename} cannot be used ({error.strerror}). If it is where the run's folder "
            "goes, choose another with output_url=PATH."
        )
    return 1, None


def _raised_by(package: str, error: Exception) -> bool:
    """Return whether the code that raised an error belongs to a package."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_globals["__name__"].startswith(f"{package}.")


def _run_with_hydra(arguments: Sequence[str], *, as_json: bool) -> None:
    """Have Hydra compose the configuration, of one run or of each in a sweep, and play it."""
    from hydra.core.hydra_config import HydraConfig

    from fl_app.errors import FlAppError
    from fl_app.launch import call_with_hydra, composed_run, objective_of

    rest = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if len(rest) < len(arguments) or "hydra.mode=MULTIRUN" in rest:
        from fl_app.sweep import run_sweep

        run_sweep(rest, as_json=as_json, launched_at=LAUNCHED_AT)
        return
    failed: list[FlAppError] = []

    def job(composed: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            config = composed_run(composed, folder)
            return objective_of(_play(config, as_json=as_json, launched_at=LAUNCHED_AT))
        except FlAppError as error:  # Hydra would print a message of its own on top
            failed.append(error)
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            return None

    call_with_hydra(job, rest)
    if failed:
        raise failed[0]


def _resumed(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return the configuration of the run that ``resume=RUN_DIR`` names, or None without it."""
    folders = [a.partition("=")[2] for a in arguments if a.startswith("resume=")]
    if not folders or folders[-1] in ("", "null"):
        return None
    from fl_app.config import resumed_config

    return resumed_config(folders[-1], [a for a in arguments if not a.startswith("resume=")])


def _composed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that overrides, and ``--config-dir`` among them, give."""
    from fl_app.config import compose_config
    from fl_app.run_config import split_config_dirs

    return compose_config(*split_config_dirs(arguments, roots=(Path.cwd(),)))


def _play(config: dict[str, Any], *, as_json: bool, launched_at: float) -> dict[str, Any]:
    """Play a run, print what came of it, and return its summary."""
    from fl_app.launch import play
    from fl_app.tracking.console import print_summary

    run_dir, summary = play(config, launched_at=launched_at, quiet=as_json)
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
    else:
        print_summary(summary)
        typer.echo(run_dir)
    return summary


if __name__ == "__main__":
    main()
