"""A stage of another run, taken as it is: its files are copied, so that this run's folder is usable by itself."""

import json

from accelerate import PartialState

from pipeline.chain import other_run
from pipeline.config.lineage import place_of
from pipeline.config.schema import Taken
from pipeline.records import manifest
from pipeline.training.context import Result, StageContext

ADAPTER_CONFIG = "adapter_config.json"


def run(ctx: StageContext[Taken]) -> Result:
    recorded = manifest.read(ctx.config.run_path)
    assert recorded is not None and recorded.tokenizer is not None, "they are written before any stage runs"
    source = other_run.fitting(ctx.config, ctx.name, recorded, recorded.tokenizer)
    if PartialState().is_main_process:
        merged = ctx.folder / "merged" if ctx.stage.weights == "with base" else None
        ctx.say(f"{ctx.name}: copying the output of {source.stage} from {source.run_dir}")
        other_run.copy(source, ctx.new_output, merged)
        _name_base(ctx)
    record = source.record
    origin = other_run.origin_of(ctx.config, ctx.name, source)
    return Result(record.metrics, record.parameters, record.datasets, record.resumed_from_step, origin)


def _name_base(ctx: StageContext[Taken]) -> None:
    """Let an adapter's config name its base as seen from this run's folder."""
    place = place_of(ctx.config, ctx.name)
    if place.adapter is None:
        return
    file = ctx.new_output / ADAPTER_CONFIG
    before = json.loads(file.read_text(encoding="utf-8"))
    base = ctx.loader.base if place.full is None else f"../../{place.full}"
    config = before | {"base_model_name_or_path": base, "revision": None if place.full else ctx.loader.revision}
    if config != before:
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
