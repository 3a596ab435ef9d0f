"""How a run that fails ends: where it was, what goes into its log, and what is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mulki_plugins.errors import MulkiError, UnexpectedError, describe_error

if TYPE_CHECKING:
    from mulki_plugins.training.run import Run


def where(run: Run) -> str:
    """How far the run is, for an error: `task digits, step 17`; or where the checkpoint is that could not be written."""
    strategy = getattr(run, "strategy", None)
    experience = getattr(strategy, "experience", None)
    moment = str(getattr(getattr(run, "checkpointing", None), "failed_at", ""))
    if strategy is None or experience is None:
        return moment or str(run.folder)
    at = f"step {strategy.step}" if strategy.is_training else "evaluation"
    return moment or f"{strategy.what_learns}, {at}"


def log_error(run: Run, error: BaseException, explanation: MulkiError | None) -> MulkiError | None:
    """Log an error with its traceback; returns what to report. An unforeseen error says where its traceback is."""
    report = explanation
    if not isinstance(error, MulkiError) or error.__cause__ is not None:
        hint = f"the full traceback is in {run.log.path}" if run.log.traceback(error) else ""
        if report is None and isinstance(error, Exception):
            report = UnexpectedError(f"{where(run)}: {describe_error(error)}", hint)
        elif report is not None and not report.hint:
            report.hint = hint
    for line in report.lines() if report else [type(error).__name__]:
        run.log.line(f"ended: {line}")
    return report
