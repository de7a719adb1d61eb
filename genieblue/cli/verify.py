"""`genieblue verify`: check a model or a bundle, one line per check."""

from typing import Any

import typer

from genieblue.cli.errors import command_line_message, with_hints
from genieblue.cli.options import (
    Base,
    BaseCode,
    Device,
    Dtype,
    Json,
    Model,
    Revision,
    check_unused_options,
    loading_options,
)
from genieblue.cli.qnn import is_bundle, verify_qnn_bundle
from genieblue.cli.terminal import choose_device, looking_for, print_json, quiet_transformers, stdout_for_json
from genieblue.cli.verdict import EvalData, EvalMetric, MaxAnswerLoss, MaxPerplexityRatio, open_held_out

NAME_WIDTH = 18  # of a check


def verify(
    ctx: typer.Context,
    model: Model,
    json_output: Json = False,
    base: Base = None,
    revision: Revision = None,
    dtype: Dtype = "auto",
    device: Device = None,
    eval_data: EvalData = None,
    metric: EvalMetric = None,
    max_answer_loss: MaxAnswerLoss = None,
    max_perplexity_ratio: MaxPerplexityRatio = None,
    trust_remote_code: BaseCode = False,
) -> None:
    """Verify a GenieBlue, a quantized base or an exported bundle.

    Each check prints one line. The exit code is 1 if any check fails. The last check runs the Python files of the
    model's repository, in a separate process. For a bundle, --base is the model to compare its text graphs with.

    --eval-data repeats the verdict on a quantized GenieBlue or a bundle, against the 16-bit one that it was made from.
    A bundle is compared on chats, by the limits of its export.
    """
    bundled, limits = is_bundle(model), ("max_answer_loss", "max_perplexity_ratio")
    if bundled:
        code = ("trust_remote_code",) if base is None and not eval_data else ()  # it applies to the base
        names = ("revision", "dtype", "device", *code, *limits, *(() if eval_data else ("metric",)))
        check_unused_options(ctx, names, "a bundle, which is fixed when it is compiled")

    def message_of(check: Any) -> str:
        return command_line_message(with_hints(check.detail, check.hints))

    def show_check(check: Any) -> None:
        typer.secho("ok    " if check.ok else "FAIL  ", nl=False, fg="green" if check.ok else "red", bold=True)
        name = check.name if len(check.name) < NAME_WIDTH else f"{check.name}: "
        typer.echo(f"{name:<{NAME_WIDTH}}{message_of(check)}")

    with stdout_for_json(json_output), looking_for(model):
        quiet_transformers()
        from conversion.verification.verify_base import is_quantized_base, verify_quantized_base

        options = loading_options(revision, trust_remote_code)
        if bundled:
            checks = verify_qnn_bundle(model, base, show_check, trust_remote_code, eval_data, metric)
        elif is_quantized_base(model, **({} if revision is None else {"revision": revision})):
            names = ("base", "eval_data", "metric", *limits)
            check_unused_options(ctx, names, "a quantized base, only to a GenieBlue on it")
            checks = verify_quantized_base(
                model, dtype=dtype, device=choose_device(device), on_check=show_check, **options
            )
        else:
            from conversion.verification.verify import verify_model

            held_out = open_held_out(eval_data, model, options, metric, max_answer_loss, max_perplexity_ratio)
            checks = verify_model(
                model,
                base=base,
                revision=revision,
                dtype=dtype,
                device=choose_device(device),
                held_out=held_out,
                trust_remote_code=trust_remote_code,
                on_check=show_check,
            )
    passed = sum(check.ok for check in checks)
    if json_output:
        listed = [{"name": check.name, "ok": check.ok, "detail": message_of(check)} for check in checks]
        print_json({"ok": passed == len(checks), "checks": listed})
    else:
        typer.echo(f"{passed} of {len(checks)} checks passed.")
    if passed < len(checks):
        raise typer.Exit(1)
