"""What a job writes into its log, and where."""

from dataclasses import dataclass

from alignkd.settings import Settings, setting

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings):
    """Options of every command that works for long."""

    log_level: str = setting("info", group="general", choices=LOG_LEVELS, help="The least important lines that are logged.")
    log_file: str | None = setting(
        None,
        group="general",
        metavar="FILE",
        help="Append the log to a file as well; of several workers, each to its own: run.log becomes run.rank3.log.",
    )
    log_json: bool = setting(False, group="general", help="Each line of the log is a JSON object; no progress bar is drawn.")
