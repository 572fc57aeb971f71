"""The mutations that `mutations.py` tries: what to replace in which file of the package, and which tests to run."""

# ruff: noqa: E501

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in `pipeline/FILE`, becomes `new`; `tests` are files, some with ` -k EXPRESSION`."""

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


Change = tuple[str, str, str]  # what, old, new

EVALUATE = ("test_figures.py", "test_divergence.py", "test_gate.py")
KEPT = "drawn_once or changed_parents or second_stage"
SAMPLING = ("test_figures_sampling.py", "test_figures.py", f"test_baselines.py -k '{KEPT}'")
STATISTICS = ("test_figures_shift.py", "test_shift_statistics.py", "test_figures.py", "test_gate.py")
SHIFT = ("test_figures.py", "test_gate.py")
GATE = ("test_figures_gate.py", "test_gate.py")
APART = "centred_score or offline_baseline or one_out_by_hand or one_group or reliability or shrinkage_is or scored_as"
GIVEN = "(given_the and (sft_mean-lora or dropout or greedy or reference))"
BASELINES = ("test_figures_ppo.py", f"test_baselines.py -k '{APART} or {GIVEN}'")
WATCHDOG = ("test_figures_watchdog.py", "test_watchdog.py")
DATA = ("test_figures_plan.py", "test_split.py", "test_data.py", "test_sources.py -k weights")
STEPS = ("test_figures_plan.py", "test_data.py -k plan", "test_refusals.py")
PLAN = (
    "test_figures_plan.py",
    "test_split.py -k 'input or training'",
    "test_functions.py -k counts",
    "test_manifest.py",
)
MANIFEST = ("test_figures_plan.py", "test_manifest.py -k 'digest or verify or commit or drop'")
TRAINING = ("test_figures_training.py", "test_equalities.py -k 'held_out_loss or reward_is_bare'", "test_gate.py")
SHIFT_SHOWN = ("test_figures.py", "test_shift_statistics.py -k 'number or shown'")
SHOWN = (
    "test_figures_plan.py",
    "test_figures.py",
    "test_manifest.py -k status",
    "test_shift_statistics.py -k 'number or shown'",
)

TABLE: tuple[tuple[str, tuple[str, ...], tuple[Change, ...]], ...] = (
    (
        "stages/evaluate.py",
        EVALUATE,
        (
            ("KL the other way round", "kl_of_completions(model, baseline,", "kl_of_completions(baseline, model,"),
            ("KL at temperature 1", "answers, stage.temperature)", "answers, 1.0)"),
            ("KL to the base", "load_policy(ctx.loader, weights_of(ctx, stage.baseline))", "load_policy(ctx.loader, weights_of(ctx, BASE))"),
            ("a tie is a loss", "TIE * (a == b)", "0.0 * (a == b)"),
            ("a tie is a win", "TIE * (a == b)", "1.0 * (a == b)"),
            ("the lower score wins", "(a > b) +", "(a < b) +"),
            ("win rate against the base", "table[stage.baseline])", "table[BASE])"),
            ("one-sided interval", "float(interval.high)", "share"),
            ("length without eos", '"length": len(sample.ids)', '"length": len([i for i in sample.ids if i != eos_id(ctx.tokenizer)])'),
            ("ended is shorter than the limit", '"ended": eos_id(ctx.tokenizer) in sample.ids', '"ended": len(sample.ids) < ctx.stage.max_new_tokens'),
            ("the last prompts", "rows.take(stage.num_prompts or len(rows))", "rows.select(range(len(rows) - min(stage.num_prompts or len(rows), len(rows)), len(rows)))"),
            ("the judge sees special tokens", "skip_special_tokens=True", "skip_special_tokens=False"),
            ("the judge sees the first message", 'row["prompt"][-1]["content"]', 'row["prompt"][0]["content"]'),
            ("without the seed", "stage.batch_size, ctx.seed)", "stage.batch_size)"),
            ("completions of the baseline", "completions(ctx, policy, prompts", "completions(ctx, stage.baseline, prompts"),
        ),
    ),
    (
        "training/divergence.py",
        EVALUATE,
        (
            ("KL of the reference to the policy", "p_logs.exp() * (p_logs - q_logs)", "q_logs.exp() * (q_logs - p_logs)"),
            ("weighted by the reference", "p_logs.exp() * (p_logs", "q_logs.exp() * (p_logs"),
            ("positions one later", "-length - 1 : -1", "-length:"),
            ("without the last token", "-length - 1 : -1", "-length - 1 : -2"),
            ("with a position of the prompt", "-length - 1 : -1", "-length - 2 : -1"),
            ("the policy at temperature 1", "ours.float().div(temperature)", "ours.float()"),
            ("multiplied by the temperature", "theirs.float().div(temperature)", "theirs.float().mul(temperature)"),
            ("mean over positions", "theirs, temperature).sum().item()", "theirs, temperature).mean().item()"),
            ("positions count from 1", "cumsum(1) - 1).clamp(min=0)", "cumsum(1)).clamp(min=0)"),
            ("log-probabilities of the tokens before", "torch.tensor(ids[1:]", "torch.tensor(ids[:-1]"),
            ("the mean KL for the largest", "abs().max().item()", "abs().mean().item()"),
        ),
    ),
    (
        "rl/stress.py",
        SAMPLING,
        (
            ("shift: the variance for the SD", "float(sd * stats", "float(sd**2 * stats"),
            ("shift: the same for all seeds", "hash64(str(seed), str(list(prompt)))", 'hash64("0", str(list(prompt)))'),
            ("shift: by the first token", "str(list(prompt))", "str(list(prompt)[:1])"),
            ("shift: not negative", "sd * stats.norm.ppf(", "sd * stats.halfnorm.ppf("),
        ),
    ),
    (
        "config/functions.py",
        ("test_figures.py", "test_figures_training.py", "test_functions.py -k number"),
        (
            ("the judge's arguments swapped", "        value = judge(prompt, completion)\n    number", "        value = judge(completion, prompt)\n    number"),
        ),
    ),
    (
        "models/generation.py",
        SAMPLING,
        (
            ("top_k", "top_k=0", "top_k=50"),
            ("top_p", "top_p=1.0", "top_p=0.9"),
            ("temperature 1", "temperature=self.temperature", "temperature=1.0"),
            ("eos cut off", "row.index(eos) + 1", "row.index(eos)"),
            ("all draws alike", "[sampling.seed, draw, prompts]", "[sampling.seed, prompts]"),
            ("all seeds alike", "[sampling.seed, draw, prompts]", "[draw, prompts]"),
            ("padded on the right", '"left")\n    with same', '"right")\n    with same'),
        ),
    ),
    (
        "training/completions.py",
        SAMPLING,
        (
            ("kept whatever the sampling", "ctx.tokenizer_key, asdict(sampling)]", "ctx.tokenizer_key]"),
            ("kept whatever the policy", "[identity_of(ctx, policy), ctx", "[ctx"),
            ("kept whatever the tokenizer", "ctx.tokenizer_key, asdict", "asdict"),
            ("kept whatever the weights", "record.inputs, record.output.files])", "record.inputs])"),
            ("every draw is the first", "by_key[digest((draw, batch))]] for draw", "by_key[digest((0, batch))]] for draw"),
            ("base is the baseline's parent", "ctx.weights(root(ctx.config)) if policy == BASE", "ctx.weights_of(ctx.stage.init) if policy == BASE"),
        ),
    ),
    (
        "shift/estimate.py",
        STATISTICS,
        (("90 % intervals", "LEVEL = 0.95", "LEVEL = 0.9"),),
    ),
    (
        "shift/variance.py",
        STATISTICS,
        (
            ("between: number of groups", "freedom = max(num_groups - 1, 1)", "freedom = max(num_groups, 1)"),
            ("within: number of scores", "np.maximum(total - num_groups, 1)", "np.maximum(total - 1, 1)"),
            ("between without within taken off", "np.maximum(among - within, 0)", "np.maximum(among, 0)"),
            ("between is not clipped", "np.maximum(among - within, 0) / size", "np.abs(among - within) / size"),
            ("ICC of the rest", "return between / np.maximum(between + within", "return within / np.maximum(between + within"),
            ("ICC of the SDs", "return between / np.maximum(between + within", "return np.sqrt(between) / np.maximum(np.sqrt(between) + np.sqrt(within)"),
            ("size of unequal groups", "(total - (counts**2).sum(axis) / total)", "(total - counts.mean(axis))"),
            ("a normal distribution's level", "PROMPTS_PER_DEGREE = 7", "PROMPTS_PER_DEGREE = 0.07"),
            ("twice as many prompts per degree", "PROMPTS_PER_DEGREE = 7", "PROMPTS_PER_DEGREE = 14"),
            ("percentiles for BCa", "confidence_level=level,", 'confidence_level=level, method="percentile",'),
            ("the basic bootstrap", "confidence_level=level,", 'confidence_level=level, method="basic",'),
        ),
    ),
    (
        "shift/calibration.py",
        STATISTICS,
        (
            ("a tie is wrong", "(np.sign(margins) + 1) / 2", "(margins > 0).astype(float)"),
            ("a tie is right", "(np.sign(margins) + 1) / 2", "(margins >= 0).astype(float)"),
            ("loss of the other side", "np.logaddexp(0, -margins)", "np.logaddexp(0, margins)"),
            ("confidence of the chosen side", "special.expit(size)", "special.expit(margins)"),
            ("Wilson's centre", "share + squared / 2)", "share)"),
            ("Wilson's width", "squared * (share * (1 - share) + squared / 4)", "squared * (share * (1 - share))"),
            ("bins", "NUM_BINS = 5", "NUM_BINS = 10"),
            ("quarters by margin", "np.argsort(size, kind", "np.argsort(margins, kind"),
            ("errors that cancel", 'abs(b["predicted"] - b["observed"]["value"])', '(b["predicted"] - b["observed"]["value"])'),
        ),
    ),
    (
        "shift/measure.py",
        STATISTICS,
        (
            ("flat below 0.2", "FLAT = 0.1", "FLAT = 0.2"),
            ("an SD by n", "np.maximum(counts - 1, 1)", "np.maximum(counts, 1)"),
            ("offsets the other way round", "offsets = means - means.mean()", "offsets = means.mean() - means"),
            ("largest are smallest", "order[::-1][:NUM_EXTREMES]", "order[:NUM_EXTREMES]"),
            ("length over all completions", 'variance.deviations(prompt["lengths"])', 'np.asarray(prompt["lengths"], float)'),
            ("correlation with brevity", "variance.pearson, means, tokens", "variance.pearson, means, -tokens"),
            ("share of all prompts", "wilson(flat, int(repeated.sum()))", "wilson(flat, len(prompts))"),
        ),
    ),
    (
        "shift/advice.py",
        STATISTICS,
        (
            ("a large ICC", "LARGE_ICC = 0.5", "LARGE_ICC = 0.51"),
            ("a small ICC", "SMALL_ICC = 0.2", "SMALL_ICC = 0.19"),
            ("length", "LENGTH = 0.8", "LENGTH = 0.81"),
            ("flat prompts", "MOST_FLAT = 0.5", "MOST_FLAT = 0.49"),
            ("calibration error", "MISCALIBRATED = 0.1 ", "MISCALIBRATED = 0.11 "),
            ("chance, open", '_accuracy(report, "low") <= CHANCE', '_accuracy(report, "low") < CHANCE'),
            ("chance by the value", '_accuracy(report, "low")', '_accuracy(report, "value")'),
            ("reversed by the value", '_accuracy(report, "high") <', '_accuracy(report, "value") <'),
            ("no signal by the value", 'within["high"] < report', 'within["value"] < report'),
            ("the far end of the correlation", 'min(sign * correlation["low"]', 'max(sign * correlation["low"]'),
            ("over is under", 'b["count"] * (b["predicted"] - b["observed"]["value"])', 'b["count"] * (b["observed"]["value"] - b["predicted"])'),
            ("prompt length by one end", 'correlation["low"] > 0 or correlation["high"] < 0', 'correlation["low"] > 0'),
        ),
    ),
    (
        "show/shift.py",
        SHIFT_SHOWN,
        (
            ("SDs swapped", '_cell(report["between_sd"])', '_cell(report["within_sd"])'),
            ("quantiles", 'low=quantiles["0.05"]', 'low=quantiles["0.25"]'),
            ("correlations swapped", '_cell(report["offset_prompt_length"])', '_cell(report["length_correlation"])'),
            ("without its sign", "{extreme['offset']:+.2f}", "{abs(extreme['offset']):+.2f}"),
        ),
    ),
    (
        "stages/shift.py",
        SHIFT,
        (
            ("scores of other prompts", "scores[n * k : (n + 1) * k]", "scores[n :: len(mine)]"),
            ("scores without the prompt", "prompts[i] + ids for i", "ids for i"),
            ("length of the text", '"tokens": len(ids)', '"tokens": len(messages[-1]["content"])'),
            ("completions of the base", "completions(ctx, stage.policy,", 'completions(ctx, "base",'),
            ("no margins", '.metrics.get("held_out")', '.metrics.get("none")'),
        ),
    ),
    (
        "chain/gate.py",
        GATE,
        (
            ("accuracy by its value", 'accuracy["low"] > limit', 'accuracy["value"] > limit'),
            ("accuracy at the limit", 'accuracy["low"] > limit', 'accuracy["low"] >= limit'),
            ("spread by its value", "spread.high >= limit", "spread.value >= limit"),
            ("spread by its low end", "spread.high >= limit", "(spread.low or 0) >= limit"),
            ("spread at the limit", "spread.high >= limit", "spread.high > limit"),
            ("length at the limit", "nearest < limit", "nearest <= limit"),
            ("length by its far end", "min(abs(length.low), abs", "max(abs(length.low), abs"),
            ("an interval across 0", "length.low < 0 < length.high", "False"),
            ("brevity is fine", "min(abs(length.low), abs(length.high))", "min(length.low, length.high)"),
            ("a loss that stays", "loss < before", "loss <= before"),
            ("NaN passes", "loss is not None and loss < before", "loss is None or loss < before"),
            ("first token at the limit", 'first["special"] <= limits', 'first["special"] < limits'),
            ("not measured passes", 'None, "it has no held-out comparisons"', 'True, "it has no held-out comparisons"'),
            ("warn stops", 'config.gate == "stop"', 'config.gate != "off"'),
            ("not measured stops", "verdict.passed is False", "not verdict.passed"),
        ),
    ),
    (
        "config/schema.py",
        GATE,
        (
            ("accuracy's limit", "accuracy: Share = 0.5", "accuracy: Share = 0.4"),
            ("spread's limit", "within_sd: Annotated[float, Field(ge=0)] | None = 0.05", "within_sd: Annotated[float, Field(ge=0)] | None = 0.04"),
            ("length's limit", "length_correlation: Share = 0.85", "length_correlation: Share = 0.9"),
            ("first token's limit", "first_token: Share = 0.5", "first_token: Share = 0.6"),
        ),
    ),
    (
        "rl/baselines.py",
        BASELINES,
        (
            ("the baseline without the shift", "[value + offset for value in values]", "[value for value in values]"),
            ("leave-one-out has all scores", '"leave_one_out": number - 1}', '"leave_one_out": number}'),
            ("towards 0", "+ (1 - self._weight) * self._overall", ""),
            ("the mean of all scores", "np.mean(list(self._means.values()))", "np.mean([value for values in scores.values() for value in values])"),
            ("its own score too", "(totals - groups) / (self._group - 1)", "totals / self._group + 0 * groups"),
            ("its own prompt too", "(totals.sum() - totals) / (len(scores) - self._group)", "totals.sum() / len(scores) + 0 * totals"),
            ("weights swapped", "self._weight * means + (1 - self._weight) * others", "(1 - self._weight) * means + self._weight * others"),
            ("reliability, one more", "(1 + (number - 1) * icc)", "(1 + number * icc)"),
            ("greedy is sampled", "temperature=0.0)", "temperature=1.0)"),
            ("answers without the prompt", "[*prompt, *ids] for prompt in own_share", "[*ids] for prompt in own_share"),
            ("the last answer alone", "answers.setdefault(tuple(prompt), []).append(answer)", "answers[tuple(prompt)] = [answer]"),
        ),
    ),
    (
        "rl/centred_reward.py",
        BASELINES,
        (
            ("the baseline is added", "return raw - scores - base", "return raw - scores + base"),
            ("the shift is left out", "shifted = scores + scores.new_tensor(shifts)", "shifted = scores + 0 * scores.new_tensor(shifts)"),
            ("the score one position later", "scores = logits[rows, start + lengths - 1]", "scores = logits[rows, (start + lengths).clamp(max=logits.shape[1] - 1)]"),
            ("centred is raw", "ScoredChunk(raw, raw - base,", "ScoredChunk(raw, raw,"),
            ("the share that ended", "1 - np.mean([row.ended", "np.mean([row.ended"),
            ("eos in the prompt counts", "(ids == self._eos))[:, start:]", "(ids == self._eos))"),
            ("padding counts", "mask[:, start:].long().cumprod(1).sum(1)", "mask[:, start:].long().sum(1)"),
            ("unexplained variance", "1 - residual.var() / target.var()", "residual.var() / target.var()"),
            ("mean squares", "residual.var() / target.var()", "(residual**2).mean() / target.var()"),
            ("values one position later", "self._values[:, start - 1 : -1]", "self._values[:, start:]"),
        ),
    ),
    (
        "models/ppo.py",
        BASELINES,
        (
            ("the critic starts with a level", "nn.init.zeros_(parameter)", "pass"),
        ),
    ),
    (
        "stages/ppo.py",
        BASELINES,
        (
            ("the baseline is scored with dropout", "    models.policy.eval()\n    return models", "    return models"),
            ("an answer begins one token late", '"answer_ids": row["input_ids"][start:]', '"answer_ids": row["input_ids"][start + 1 :]'),
        ),
    ),
    (
        "rl/healthy_ranges.py",
        WATCHDOG,
        (
            ("kl, low", '"kl",\n        -1.0,\n        50.0,\n        3', '"kl",\n        -1.01,\n        50.0,\n        3'),
            ("kl, high", '"kl",\n        -1.0,\n        50.0,\n        3', '"kl",\n        -1.0,\n        50.5,\n        3'),
            ("kl, patience", '"kl",\n        -1.0,\n        50.0,\n        3', '"kl",\n        -1.0,\n        50.0,\n        4'),
            ("entropy, low", '"entropy",\n        0.1,\n        3.0,\n        5', '"entropy",\n        0.09,\n        3.0,\n        5'),
            ("entropy, high", '"entropy",\n        0.1,\n        3.0,\n        5', '"entropy",\n        0.1,\n        3.1,\n        5'),
            ("entropy, patience", '"entropy",\n        0.1,\n        3.0,\n        5', '"entropy",\n        0.1,\n        3.0,\n        4'),
            ("length, low", '"length",\n        1 / 3,\n        3.0,\n        5', '"length",\n        0.3,\n        3.0,\n        5'),
            ("length, high", '"length",\n        1 / 3,\n        3.0,\n        5', '"length",\n        1 / 3,\n        2.9,\n        5'),
            ("clip fraction, high", "-math.inf,\n        0.5,\n        5", "-math.inf,\n        0.51,\n        5"),
            ("clip fraction, patience", "-math.inf,\n        0.5,\n        5", "-math.inf,\n        0.5,\n        6"),
            ("explained variance, low", "-1.0,\n        math.inf,\n        5", "-1.1,\n        math.inf,\n        5"),
            ("explained variance, warm-up", "warm_up=10", "warm_up=11"),
            ("missing eos, high", "-math.inf,\n        2.0,\n        5", "-math.inf,\n        2.1,\n        5"),
            ("missing eos, fine below", "fine_below=0.5", "fine_below=0.49"),
            ("equal rewards, high", "-math.inf,\n        0.9,\n        5", "-math.inf,\n        0.89,\n        5"),
            ("bounds are not scaled", "first if self.of_first else 1.0", "1.0"),
            ("both bounds must be broken", "max(high, self.fine_below)", "min(high, self.fine_below)"),
        ),
    ),
    (
        "config/logged_figures.py",
        WATCHDOG,
        (
            ("lengths below 1", "max(logged[LENGTH], 1.0)", "logged[LENGTH]"),
        ),
    ),
    (
        "rl/watchdog.py",
        WATCHDOG,
        (
            ("a value on the bound", "low <= value <= high", "low < value < high"),
            ("the last update of the warm-up", "update <= healthy.warm_up", "update < healthy.warm_up"),
            ("patience and one more", "len(since) < healthy.patience", "len(since) <= healthy.patience"),
            ("not in a row", "self._since.pop(name, None)", "None"),
            ("the first of all is the last", "self._first.setdefault(name, value)", "self._first[name] = value"),
            ("NaN is waited for", "if is_finite and len(since)", "if len(since)"),
            ("warned of again and again", 'if healthy.measure in {alarm["measure"] for alarm in self.alarms}:', "if False:"),
        ),
    ),
    (
        "config/stage_types.py",
        WATCHDOG,
        (
            ("PPO's entropy is a sum", '"objective/entropy": ("entropy", -1)', '"objective/entropy": ("entropy", 0)'),
            ("RLOO's KL is of tokens", '"kl": ("kl", 1)', '"kl": ("kl", 0)'),
        ),
    ),
    (
        "rl/best_policy.py",
        WATCHDOG,
        (
            ("the worst is the best", "not (score <= self._best[1]", "not (score >= self._best[1]"),
            ("the later of two equals", "not (score <= self._best[1]", "not (score < self._best[1]"),
            ("looked at one update late", "state.global_step % self.every == 0", "state.global_step % self.every == 1"),
            ("not at the end", 'if self.history[-1]["update"] != state.global_step:', "if False:"),
        ),
    ),
    (
        "chain/preflight.py",
        STEPS,
        (
            ("steps without accumulation", '* options["gradient_accumulation_steps"]', ""),
            ("PPO's steps are rounded down", 'math.ceil((options["total_episodes"] or', 'math.floor((options["total_episodes"] or'),
            ("PPO's epochs", 'options["num_train_epochs"] * rows) / batch', "rows) / batch"),
            ("without generations", 'rows *= options["num_generations"]', "pass"),
            ("packed rows are rounded down", 'math.ceil(audit.tokens / options["max_length"])', 'audit.tokens // options["max_length"]'),
            ("a partial batch is left out", "math.ceil(math.ceil(rows / batch)", "math.ceil((rows // batch)"),
            ("partial batches run on", "math.ceil(math.ceil(rows / batch) *", "math.ceil(rows / batch *"),
            ("epochs are forgotten", ' * options["num_train_epochs"])', ")"),
            ("max_steps is not looked at", 'if options["max_steps"] > 0:', "if False:"),
        ),
    ),
    (
        "chain/staleness.py",
        PLAN,
        (
            ("more options are neutral", '"logging_", "log_"', '"logging_", "learning_", "log_"'),
            ("the seed is left out", 'own["seed"] = config.seed_of(name)', 'own["seed"] = config.seed'),
            ("children do not run again", "decisions[parent].run]", "not decisions[parent].run]"),
            ("only what is new is a change", "for key in old.keys() | new.keys()", "for key in new.keys()"),
            ("parents' outputs do not count", 'digest(record.output.files) if record else ""', '""'),
            ("held-out prompts do not count", '[f"{role}: held-out prompts in it"] = removed', '[f"{role}: held-out prompts in it"] = ""'),
            ("data by name", "inputs[role] = fingerprints.of_dataset(dataset, config.data[dataset], config.folder)", "inputs[role] = dataset"),
            ("old and new swapped", "({before} -> {after})", "({after} -> {before})"),
        ),
    ),
    (
        "config/graph.py",
        DATA,
        (
            ("eval_data is trained on", 'trains and role == "data"', "trains"),
            ("evaluate's data is trained on", 'trains and role == "data"', 'role == "data"'),
            ("every dataset is split", "uses(config, TRAIN) and dataset", "uses(config, TRAIN) or dataset"),
            ("texts and prompts mix", "(other in texts) == (dataset in texts)", "True"),
        ),
    ),
    (
        "data/heldout.py",
        DATA,
        (
            ("the other side", "keys < np.uint64(", "keys >= np.uint64("),
            ("case counts", ".casefold()", ""),
            ("spaces count", '" ".join(plain.split())', "plain"),
            ("the last message", 'next((m["content"] for m in row["prompt"] if', 'next((m["content"] for m in row["prompt"][::-1] if'),
        ),
    ),
    (
        "data/prepare.py",
        DATA,
        (
            ("the training side is not cleaned", "np.isin(keys, self.evaluated_elsewhere(request.dataset))", "np.zeros(len(keys), bool)"),
            ("one token too long", '["row"] > request.max_length', '["row"] >= request.max_length'),
            ("repeated prompts count again", "if request.unique_prompts:", "if False:"),
        ),
    ),
    (
        "data/sieve.py",
        DATA,
        (
            ("what is dropped stays", "self.kept = self.kept & ~rows", "pass"),
            ("tokens of all rows", 'column(rows, f"_{name}")[kept].sum()', 'column(rows, f"_{name}").sum()'),
            ("lengths of all rows", "np.quantile(values[kept], QUANTILES", "np.quantile(values, QUANTILES"),
            ("the largest source sets the size", "unit = min(len(rows)", "unit = max(len(rows)"),
        ),
    ),
    (
        "data/rows.py",
        DATA,
        (
            ("the shorter side", "np.max([lengths[side] for side", "np.min([lengths[side] for side"),
            ("prompt and completion swapped", '{"prompt": len(ids["input_ids"]) - completion, "completion": completion}', '{"completion": len(ids["input_ids"]) - completion, "prompt": completion}'),
        ),
    ),
    (
        "data/row_kind.py",
        DATA,
        (
            ("the end of a prompt is cut", "ids[column][:start] + ids[column][start + over :]", "ids[column][: len(ids[column]) - over]"),
        ),
    ),
    (
        "system/digests.py",
        MANIFEST,
        (
            ("the order of keys counts", "sort_keys=True, ", ""),
            ("another digest", "hashlib.sha256(json", "hashlib.sha1(json"),
            ("files in folders are left out", 'folder.rglob("*")', 'folder.glob("*")'),
        ),
    ),
    (
        "records/manifest.py",
        MANIFEST,
        (
            ("a changed file passes", "if file_digest(path) != expected:", "if False:"),
            ("the others are forgotten", "if name not in stages}", "if name in stages}"),
        ),
    ),
    (
        "show/tables.py",
        SHOWN,
        (
            ("thousands", "if value >= size:", "if value > size:"),
            ("minutes", "round(max(seconds, 0)), 60)", "round(max(seconds, 0)), 100)"),
            ("small numbers", "0 < abs(value) < 1e-2", "0 < abs(value) < 1"),
        ),
    ),
    (
        "show/results.py",
        SHOWN,
        (
            ("ended as a share", 'else 100 * ended, 0)', 'else ended, 0)'),
            ("length is KL", 'number(summary.get("length"), 1), f"{share}', 'number(summary.get("kl"), 1), f"{share}'),
            ("the reward model before the judge", '"judge" if "judge_win_rate" in summary else "score"', '"score" if "score_win_rate" in summary else "judge"'),
            ("interval reversed", "math.nan if value is None else value for value in values", "math.nan if value is None else value for value in (values[0], *values[:0:-1])"),
            ("within is between", '"within-prompt SD": metrics["within_sd"]', '"within-prompt SD": metrics["between_sd"]'),
        ),
    ),
    (
        "show/plan.py",
        SHOWN,
        (
            ("trainable is total", "count(fact.parameters['trainable'])", "count(fact.parameters['total'])"),
            ("rows are tokens", "{count(audit.rows)}, {count(audit.tokens)}", "{count(audit.tokens)}, {count(audit.rows)}"),
            ("what is left out", "({count(audit.num_dropped)} left out)", "({count(audit.read)} left out)"),
        ),
    ),
    (
        "training/assertions.py",
        TRAINING,
        (
            ("the least likely", ".argmax()) for ids in prompts", ".argmin()) for ids in prompts"),
            ("the share that is not special", "token in tokenizer.all_special_ids for", "token not in tokenizer.all_special_ids for"),
            ("the rarest", "statistics.mode(tokens)", "min(tokens, key=tokens.count)"),
            ("eos alone", "token in tokenizer.all_special_ids", "token == tokenizer.eos_token_id"),
        ),
    ),
    (
        "training/fit.py",
        TRAINING,
        (
            ("first is last", "= values[0]", "= values[-1]"),
            ("the held-out loss before", 'metrics["initial_eval_loss"] = losses[0]', 'metrics["initial_eval_loss"] = losses[-1]'),
            ("steps", '["steps"] = trainer.state.global_step', '["steps"] = trainer.state.global_step + 1'),
        ),
    ),
    (
        "stages/reward.py",
        TRAINING,
        (
            ("margins the other way round", "[chosen - rejected for", "[rejected - chosen for"),
            ("scores without the prompt", 'side: row["prompt_ids"] + row[side]', "side: row[side]"),
            ("pairs out of step", "scores[::2], scores[1::2]", "scores[: len(scores) // 2], scores[len(scores) // 2 :]"),
        ),
    ),
    (
        "stages/sft.py",
        TRAINING,
        (
            ("prompts with the first token of the answer", 'row["completion_mask"].index(1)]', 'row["completion_mask"].index(1) + 1]'),
        ),
    ),
    (
        "stages/rloo_grpo.py",
        TRAINING,
        (
            ("the shift is taken off", "return [score + offset for", "return [score - offset for"),
            ("scores without the prompt", "prompt_ids(ctx.tokenizer, p) + ids for", "ids for"),
        ),
    ),
)  # fmt: skip

MUTATIONS = [Mutation(file, what, old, new, tests) for file, tests, changes in TABLE for what, old, new in changes]
