"""One-line faults written by hand: what a rule does not think of, each of a promise that some test keeps."""

from __future__ import annotations


def path_of(file: str) -> str:
    """In the repository, of a file of ``WRITTEN``: in the package, unless it is a kernel's source."""
    return file if file.startswith("csrc/") else f"grpo_kernels/{file}"


WRITTEN = {
    "clip: sides swapped": (
        "objectives/surrogates/token.py",
        "(advantage > 0) & (ratio > high)",
        "(advantage > 0) & (ratio < low)",
    ),
    "clip: bound exclusive": (
        "objectives/surrogates/token.py",
        "negative & (ratio < low)",
        "negative & (ratio <= low)",
    ),
    "clip: slope kept": (
        "objectives/surrogates/token.py",
        "inside.masked_fill(clipped, 0.0)",
        "inside.masked_fill(clipped_low, 0.0)",
    ),
    "clip: dual dropped": (
        "objectives/surrogates/token.py",
        "if self.dual is not None:\n            clipped_dual",
        "if False:\n            clipped_dual",
    ),
    "surrogate: sign": (
        "objectives/surrogates/token.py",
        "value = times(-t.advantage, t.ratio)",
        "value = times(t.advantage, t.ratio)",
    ),
    "cispo: weight": (
        "objectives/surrogates/token.py",
        "-t.ratio.clamp(low, high) * t.advantage",
        "-t.ratio * t.advantage",
    ),
    "sapo: sides swapped": (
        "objectives/surrogates/token.py",
        "torch.where(x < 0, e, 1.0)",
        "torch.where(x > 0, e, 1.0)",
    ),
    "dppo: directions swapped": (
        "objectives/surrogates/token.py",
        "fallen & (t.advantage < 0)",
        "fallen & (t.advantage > 0)",
    ),
    "dro: half a spring": (
        "objectives/surrogates/token.py",
        "Terms(value, pull, -t.advantage",
        "Terms(value, pull / 2, -t.advantage",
    ),
    "vespo: k": ("objectives/surrogates/sequence.py", "lam + k * log_w", "lam - k * log_w"),
    "gmpo: slope kept": ("objectives/surrogates/sequence.py", "~(low | high)", "low == low"),
    "weight of 0: NaN kept": ("objectives/maths.py", "zero = (weight == 0) |", "zero = ((weight == 0) & ~x.isnan()) |"),
    "fp16: temperature": (
        "linear.py",
        "    largest = largest * logit_args.logit_scale / logit_args.temperature\n",
        "",
    ),
    "torch: weight of 0": (
        "backends/eager_gradient.py",
        "read = rows.live & ((g != 0) | (h != 0))",
        "read = rows.live",
    ),
    "direct slope dropped": ("calls/terms.py", "else policy.direct)", "else 0.0)"),
    "rollout: level": ("objectives/rollout.py", '"geometric": "mean"', '"geometric": "sum"'),
    "rollout: unknown": ("objectives/rollout.py", "torch.where(rollout.isnan(), 1.0, factor)", "factor"),
    "rollout: current policy": ("calls/token_batch.py", "if not scheme.of_policy)", ")"),
    "entropy threshold": ("calls/terms.py", "low = entropy < batch", "low = entropy > batch"),
    "temperature: where nothing is live": (
        "calls/temperature.py",
        "torch.where(tokens.live, _at_tokens(tokens, temperature, sequences), 1.0)",
        "_at_tokens(tokens, temperature, sequences)",
    ),
    "temperature: of the filters": (
        "calls/support.py",
        "temperature = self.rows.temperature.reshape(-1)[index, None]",
        "pass",
    ),
    "temperature: of the copies": (
        "calls/support.py",
        "own = None if rows.temperature is None else rows.temperature.reshape(-1)[index][None]",
        "own = None",
    ),
    "temperature: of a chunk": (
        "calls/sweep.py",
        "sweep.temperature[:, first:last]",
        "sweep.temperature[:, : last - first]",
    ),
    "temperature: of the ranks": (
        "calls/vocabulary.py",
        "temperature = rows.temperature.to(temperature.dtype)",
        "pass",
    ),
    "temperature: of the teacher": (
        "calls/divergence.py",
        "tokens.temperature is None or divergence.teacher_temperature is not None",
        "tokens.temperature is None",
    ),
    "temperature: of a recorded teacher": (
        "calls/recorded_teacher.py",
        "wanted = of_rows.reshape(-1, 1)",
        "wanted = of_rows.reshape(-1, 1)[:1]",
    ),
    "temperature: fp16": ("linear.py", "slopes = [values / temperature for values in slopes]", "pass"),
    "support: drawn token": ("calls/support.py", "kept.gather(1, column) | held[:, None]", "kept.gather(1, column)"),
    "recorded: one row later": ("backends/sets.py", "positions, right=True)", "positions, right=False)"),
    "recorded: the drawn token": ("backends/sets.py", "torch.where(drawn, -torch.expm1(log_prob), -p)", "-p"),
    "recorded: entropies": ("backends/sets.py", "-p * (log_p + entropy)", "-p * log_p"),
    "recorded: whole rows": (
        "backends/ops.py",
        "rows._replace(live=rows.live & ~sets.filled.view_as(rows.live))",
        "rows",
    ),
    "recorded: not counted": (
        "loss.py",
        'with_sum("outside_support", missing)',
        'with_sum("outside_support", 0 * missing)',
    ),
    "recorded: states of another row": (
        "calls/recorded_head.py",
        "row // length * states.shape[-2] + row % length",
        "row",
    ),
    "recorded: NaN times 0": ("calls/recorded_head.py", "products.masked_fill_((slopes == 0)[:, None], 0)", "products"),
    "vocabulary: states not summed": ("calls/sharding.py", 'shard.group is None or hidden_grad == "partial"', "True"),
    "vocabulary: token elsewhere": (
        "calls/vocabulary.py",
        "column.copy_(torch.where(held, column, first))",
        "pass",
    ),
    "vocabulary: shares": ("calls/vocabulary.py", "entropy - log_share, 0.0)", "entropy, 0.0)"),
    "vocabulary: confident rows": (
        "calls/vocabulary.py",
        "-torch.log1p(to_top.exp()",
        "-torch.log(1 + to_top.exp()",
    ),
    "vocabulary: impossible shards": (
        "calls/vocabulary.py",
        'possible = anchor != float("-inf")',
        "possible = anchor == anchor",
    ),
    "vocabulary: chunks": ("calls/chunks.py", "else tokens.shard.even", "else tokens.columns"),
    "ranks: own order": (
        "objectives/groups.py",
        "return everyones.view(ranks, *values.shape)",
        "return everyones.view(ranks, *values.shape).roll(torch.distributed.get_rank(group), 0)",
    ),
    "triton: rollout": ("backends/triton/surrogates.py", "policy_weight = weighed(policy_weight, weight)", "pass"),
    "k3: sign": ("objectives/kl.py", "KLTerms(k3_of(-x), -torch.expm1(-x), x)", "KLTerms(k3_of(x), torch.expm1(x), x)"),
    "k2: slope": (
        "objectives/kl.py",
        "KLTerms(x * x / 2, x, x + x * x / 2)",
        "KLTerms(x * x / 2, 2 * x, x + x * x / 2)",
    ),
    "kl: limit ignored": ("objectives/kl.py", "outside | beyond(value, output_limit)", "outside"),
    "ratio: limit ignored": (
        "calls/terms.py",
        "saturated.exp(), beyond(raw, limit)",
        "saturated.exp(), beyond(raw, None)",
    ),
    "ratio: sign": ("calls/terms.py", "cls(saturated, saturated.exp()", "cls(saturated, (-saturated).exp()"),
    "gspo: sum for mean": (
        "calls/terms.py",
        "(own, config.pooling.pooled if report",
        '(own, "sum" if report',
    ),
    "gspo: slope not shared": (
        "calls/terms.py",
        "batch.at_tokens(slope, total) if running is None else running()",
        "slope if running is None else running()",
    ),
    "kl to the sampler: unknown": (
        "calls/terms.py",
        "unknown = sampler.isnan()",
        "unknown = sampler.isnan() != sampler.isnan()",
    ),
    "kl to the sampler: the old policy's": (
        "calls/terms.py",
        "sampler = ratio.old if inputs.rollout is None else inputs.rollout",
        "sampler = ratio.old",
    ),
    "kl to the sampler: coefficient": (
        "calls/batch.py",
        "else _scaled(weight, rollout_kl_coef)",
        "else weight",
    ),
    "prefix: over a bound": (
        "objectives/sequences.py",
        "return (self.sequence_of[1:] == self.sequence_of[:-1])",
        "return (self.sequence_of[1:] == self.sequence_of[1:])",
    ),
    "prefix: the first of equal ones": (
        "objectives/running.py",
        "smaller = (before.value < self.value",
        "smaller = (before.value <= self.value",
    ),
    "prefix: slopes of those before": (
        "objectives/running.py",
        "shared = backward_scan(real, sequences.links(real)) if",
        "shared = forward_scan(real, sequences.links(real)) if",
    ),
    "prefix: metrics of the token": (
        "calls/terms.py",
        "of_metrics = running().values",
        "of_metrics = own.double()",
    ),
    "impossible tokens": (
        "calls/terms.py",
        "stops = impossible if free is None",
        "stops = impossible & False if free is None",
    ),
    "kl weight forgotten": ("calls/terms.py", "weighed(weight, kl.slope)", "kl.slope"),
    "token weights forgotten": ("calls/batch.py", "weighed(weight, factor), 0.0", "weight, 0.0"),
    "entropy weight: sign": (
        "calls/reduction.py",
        "None if weight is None else -weight",
        "None if weight is None else weight",
    ),
    "mean: off by one": (
        "objectives/aggregation.py",
        "lengths = sequences.lengths(mask).clamp(min=1)",
        "lengths = sequences.lengths(mask).clamp(min=2)",
    ),
    "normalizer ignored": (
        "objectives/aggregation.py",
        "sequences.count if normalizer is None else normalizer",
        "sequences.count",
    ),
    "world size": ("objectives/normalizer.py", "Normalizer(total / divisor", "Normalizer(total"),
    "normalizer: outside of the bounds": (
        "objectives/sequences.py",
        "return live & Packed.read(",
        "return live | Packed.read(",
    ),
    "metrics: extremes": (
        "objectives/metrics.py",
        'FIELDS.index("ratio_max") : last].amax(0)',
        'FIELDS.index("ratio_max") : last].amin(0)',
    ),
    "metrics: count": ("objectives/metrics.py", '_mean("kl_sum", "kl_count")', '_mean("kl_sum", "ratio_count")'),
    "unused row": (
        "backends/memory.py",
        "if length is not None and length < logits.shape[-2]:",
        "if False:",
    ),
    "rescale forgotten": (
        "backends/eager.py",
        "gradient.mul_(upstream / announced)",
        "gradient.mul_(announced / announced)",
    ),
    "second backward": ("calls/autograd.py", "        if ctx.spent:\n", "        if False:\n"),
    "packed: bounds": ("calls/tokens.py", "packed.cu_seqlens[1:] - 1)", "packed.cu_seqlens[1:])"),
    "align: no shift": (
        "calls/tokens.py",
        "return input_ids[:, 1:], mask[:, 1:]",
        "return input_ids[:, :-1], mask[:, 1:]",
    ),
    "torch: temperature": (
        "backends/eager_rows.py",
        "(1.0 if rows.softcap else scale) / temperature",
        "(1.0 if rows.softcap else scale) + 0 * temperature",
    ),
    "torch: softcap slope": (
        "backends/eager_gradient.py",
        ".div_(q.numbers.add_(1)).div_(q.numbers)",
        ".div_(q.numbers.add_(1))",
    ),
    "torch: entropy slope": ("backends/eager_gradient.py", "log_p.add_(entropy).mul_(", "log_p.mul_("),
    "in place: unnoticed": (
        "backends/ops.py",
        "        torch.autograd.graph.increment_version(tensor)\n",
        "        pass\n",
    ),
    "linear: later chunks": (
        "calls/head.py",
        "            torch.baddbmm(product, *factors, out=product)",
        "            torch.bmm(*factors, out=product)",
    ),
    "linear: bias": ("calls/head.py", "part = gradient.sum(0, dtype=self._real)", "part = gradient[0].to(self._real)"),
    "triton: sampled column": (
        "backends/triton/rows.py",
        "BLOCK) == target - start, 0, exps)",
        "BLOCK) == target, 0, exps)",
    ),
    "triton: overflow kept": (
        "backends/triton/forward.py",
        "if hold(total, weighted, value, factor):",
        "if vocab > 0:",
    ),
    "triton: large origin": (
        "backends/triton/rows.py",
        "(tl.abs(residual_of(value, factor)) <= 1)",
        "(tl.abs(origin_of(value, factor)) < 3e38)",
    ),
    "triton: rounding kept": (
        "backends/triton/rows.py",
        "correction = tl.exp2(-residual)",
        "correction = tl.exp2(-residual * 0)",
    ),
    "triton: entropy slope": (
        "backends/triton/rows.py",
        "constant = -(g + h * entropy) * derivative",
        "constant = -g * derivative",
    ),
    "triton: softcap slope": (
        "backends/triton/rows.py",
        "gradient = gradient * (tanh_derivative",
        "gradient = gradient * (1 + 0 * tanh_derivative",
    ),
    "triton: old ignored": (
        "backends/triton/one_pass.py",
        "row_old = tl.load(old + row_index, mask=inside)",
        "row_old = row_log_prob",
    ),
    "triton: clip": (
        "backends/triton/surrogates.py",
        "(advantage < 0) & (ratio < low)",
        "(advantage < 0) & (ratio < high)",
    ),
    "triton: last block": ("backends/triton/forward.py", "    if whole < end:", "    if whole > end:"),
    "triton: grad_scale": ("backends/triton/one_pass.py", "g = grad_scale * row_terms(", "g = row_terms("),
    "triton: strides": (
        "backends/triton/rows.py",
        "batch.to(tl.int64) * batch_stride",
        "batch.to(tl.int64) * row_stride",
    ),
    "triton pairs: likely column": (
        "backends/triton/pairs.py",
        "d = tl.where(is_likely(p), row_centre, distance_of(value, teacher_value, distances, row_shift)[1])",
        "d = distance_of(value, teacher_value, distances, row_shift)[1]",
    ),
    "triton pairs: centre": ("backends/triton/pairs.py", "(q > 0), by_others, centre)", "(q > 0), centre, centre)"),
    "triton pairs: largest column lost": (
        "backends/triton/pairs.py",
        "less_x = tl.where(larger, largest, x)",
        "less_x = x",
    ),
    "triton pairs: error of the log-sums": (
        "backends/triton/pairs.py",
        "value = total - error * of_error(",
        "value = total - 0 * error * of_error(",
    ),
    "triton pairs: sum of p - q": (
        "backends/triton/pairs.py",
        'tl.where(total < float("inf"), slopes - total, 0)',
        "slopes * 0",
    ),
    "divergence: direction": (
        "objectives/divergence.py",
        "return Columns(_kl_term(p, d, q), 0.0, d)",
        "return Columns(_kl_term(q, -d, p), minus(p, q, d), 0.0)",
    ),
    "divergence: mixture": (
        "objectives/divergence.py",
        "_over_mixture(d, 1 - mix), _over_mixture(-d, mix)",
        "_over_mixture(d, mix), _over_mixture(-d, 1 - mix)",
    ),
    "divergence: temperature": (
        "backends/eager_divergence.py",
        "gradient * pair.factor * weight",
        "gradient * weight",
    ),
    "divergence: teacher's temperature": (
        "calls/teacher.py",
        "LogitArgs(temperature if own is None else own,",
        "LogitArgs(temperature,",
    ),
    "divergence: centre": (
        "backends/eager_divergence.py",
        "relative = (columns.slope - _slope_at(kind, centre, mix)) - mean",
        "relative = columns.slope - mean",
    ),
    "divergence: mean": (
        "backends/eager_divergence.py",
        "relative = (columns.slope - _slope_at(kind, centre, mix)) - mean",
        "relative = columns.slope - _slope_at(kind, centre, mix) - 0 * mean",
    ),
    "divergence: one log-sum": (
        "backends/eager_divergence.py",
        "row.teacher_log_sum - row.log_sum)",
        "0 * row.teacher_log_sum - row.log_sum)",
    ),
    "divergence: mask": (
        "backends/eager_divergence.py",
        "output.copy_(torch.where(live, value, 0.0))",
        "output.copy_(value)",
    ),
    "divergence: coefficient": (
        "calls/batch.py",
        "if coef is None else _scaled(weight, coef)",
        "if coef is None else weight",
    ),
    "divergence: teacher learns": (
        "calls/teacher.py",
        "if value is not None and value.requires_grad:",
        "if False:",
    ),
    "divergence: padding counts": (
        "loss.py",
        'teacher, (logits,) = first_columns("grpo_loss", vocab_size, teacher, -1, logits)',
        'teacher, _ = first_columns("grpo_loss", vocab_size, teacher, -1, logits)',
    ),
    "divergence: another vocabulary": (
        "calls/divergence.py",
        "if columns != tokens.columns:",
        "if columns < tokens.columns:",
    ),
    "gae: decay": ("objectives/advantages.py", "discount * lam)", "discount)"),
    "gae: over a bound": (
        "objectives/advantages.py",
        "masked_fill(line.first[:, 1:] != line.first[:, :-1], 0.0)",
        "abs()",
    ),
    "ranks: own rank first": (
        "objectives/groups.py",
        "return add_in_order(gather(values, group))",
        "return add_in_order(gather(values, group).roll(-torch.distributed.get_rank(group), 0))",
    ),
    "ranks: sums of a part": (
        "objectives/sequences.py",
        "return add_in_order(self.everyones(values)[:, 0]).to(dtype)",
        "return self.part.sum(values, dtype)",
    ),
    "ranks: tokens of a part": (
        "objectives/sequences.py",
        "return self.sum(mask, accumulate_dtype(mask.device)).sum()",
        "return mask.sum()",
    ),
    "ranks: asked one by one": (
        "objectives/sequences.py",
        "        self.ask(*values)\n        return [",
        "        return [",
    ),
    "ranks: halves in rank order": ("objectives/running.py", "second.flip(0)", "second"),
    "ranks: slopes of a part": (
        "objectives/running.py",
        "torch.where(takes, sums + pieces.expand(to_each), sums)",
        "sums",
    ),
    "ranks: equal ones of an earlier rank": (
        "objectives/running.py",
        "taken = own.after(before)",
        "taken = own.after(before) | (own.value == before.value)",
    ),
    "ranks: sequences counted on each": (
        "objectives/sequences.py",
        "return torch.distributed.get_rank(self.group) == 0",
        "return True",
    ),
    "ranks: normalizer counted on each": (
        "objectives/normalizer.py",
        "and torch.distributed.get_rank(of_sequences) > 0",
        "and False",
    ),
    "ranks: chunks of parts": ("linear.py", "if together and not isinstance(batch.sequences, Joined)", "if together"),
    "ranks: advantages that are both": (
        "calls/batch.py",
        "[: 1 if isinstance(sequences, Joined) else 2]",
        "[:2]",
    ),
    "reference: mask": ("verification/reference/__init__.py", "mask & inside.view(shape)", "mask | inside.view(shape)"),
    "mask: read": ("objectives/checks.py", "return mask.bool()", "return mask == 1"),
    "kernel of rows: consumers: wait for a tile": (
        "csrc/cuda/consumer.h",
        "shared_.filled[at.place].wait(at.lap);\n      sweep_sums",
        "sweep_sums",
    ),
    "kernel of rows: consumers: wait for slopes": (
        "csrc/cuda/consumer.h",
        "shared_.settled[index % kRowsAhead].wait(turn_at<kMode>(index, kStages<kMode> - 1) & 1);",
        ";",
    ),
    "kernel of rows: loader: wait for room": (
        "csrc/cuda/loading.h",
        "shared.emptied[cursor.place].wait(cursor.lap ^ 1);",
        "",
    ),
    "kernel of rows: storer: wait for gradients": (
        "csrc/cuda/loading.h",
        "shared.written[cursor",
        "if (tile == 0) shared.written[cursor",
    ),
    "kernel of rows: storer: wait for reading": ("csrc/cuda/loading.h", "port::bulk_wait_read<kStoresInFlight>();", ""),
    "kernel of rows: storer: all of a row given back": (
        "csrc/cuda/loading.h",
        "(last ? 0 : kStoresInFlight)",
        "kStoresInFlight",
    ),
    "kernel of rows: settler: wait for the cluster": (
        "csrc/cuda/settler.h",
        "shared_.arrived[place_].wait_for_cluster(turn & 1);",
        "",
    ),
    "kernel of rows: settler: slots overwritten unread": (
        "csrc/cuda/settler.h",
        "shared_.drained[place_].wait_for_cluster(",
        "(void)(",
    ),
    "kernel of rows: kernel: no meeting at the start": (
        "csrc/cuda/row_kernel.h",
        "port::sync_cluster();  // nobody",
        ";  // nobody",
    ),
    "kernel of rows: slices: too short": (
        "csrc/cuda/layout.h",
        "(vectors + cluster - 1) / cluster * width",
        "vectors / cluster * width",
    ),
    "kernel of rows: tail: not loaded": ("csrc/cuda/loading.h", "(from + to.columns) + 15)", "(from + to.columns))"),
    "kernel of rows: vectors: not shifted": ("csrc/cuda/vectors.h", "piece.skew % 4 * 8", "0"),
    "kernel of rows: tail: not stored": (
        "csrc/cuda/loading.h",
        "advanced(from, after), edges.tail, lane);\n}",
        "from, 0, lane);\n}",
    ),
    "kernel of rows: sums: sampled column counted": ("csrc/cuda/sums.h", "&& first + i != piece.target", ""),
    "kernel of rows: gradient: sampled column of an unaligned row": (
        "csrc/cuda/gradient.h",
        "piece.target - first_of(k)",
        "piece.target - k",
    ),
    "kernel of rows: gradient: end of an unaligned tile": ("csrc/cuda/gradient.h", "(kPlain ? 0 : 1);", "0;"),
    "kernel of rows: sums: origin's rounding kept": (
        "csrc/cuda/sums.h",
        "    if (!near) return;\n",
        "    near = false;\n    return;\n",
    ),
    "kernel of rows: sums: too large": ("csrc/cuda/sums.h", "if (sum < kLargestSum<real>)", "if (sum == sum)"),
    "kernel of rows: merge: references ignored": ("csrc/cuda/sums.h", "if (other_reference > reference)", "if (false)"),
    "kernel of rows: rows: one temperature for all": (
        "csrc/cuda/job.h",
        "return p.temperature ? logit_map",
        "return false ? logit_map",
    ),
    "kernel of rows: order: records of dead rows": (
        "csrc/cuda/token_kernels.h",
        "        put_stats<real>(p, r, {0, 0, 0, 0});\n",
        "",
    ),
    "kernel of pairs: the shift is not corrected": ("csrc/cuda/divergence.h", "real(odds.shift - error)", "odds.shift"),
    "kernel of pairs: an error of the log-sums stays in D": (
        "csrc/cuda/divergence.h",
        "error * of_error(",
        "0 * of_error(",
    ),
    "kernel of pairs: a likely column has a d of its own": (
        "csrc/cuda/divergence.h",
        "if (is_likely(p) && magnitude",
        "if (false && magnitude",
    ),
    "kernel of pairs: its gradient has one": (
        "csrc/cuda/divergence.h",
        "is_likely(at.p[i]) ? slopes.likely : at.d[i]",
        "at.d[i]",
    ),
    "kernel of pairs: it is lost where there is a larger one": (
        "csrc/cuda/divergence.h",
        "      others.add(left_out);\n",
        "",
    ),
    "kernel of pairs: it is left out twice": ("csrc/cuda/divergence.h", "      others.add(sums.left_out);\n", ""),
    "kernel of pairs: of a thread it is lost": (
        "csrc/cuda/divergence.h",
        "const real less = larger ? largest : x[i]",
        "const real less = x[i]",
    ),
    "kernel of pairs: an infinite divergence has a mean": (
        "csrc/cuda/divergence.h",
        "value == INFINITY && ",
        "false && ",
    ),
    "kernel of pairs: a spoilt row has a divergence": (
        "csrc/cuda/divergence.h",
        "if (none != none) return",
        "if (false) return",
    ),
    "kernel of pairs: a teacher's columns are its first": (
        "csrc/cuda/divergence.h",
        "load_from(pair.teacher, first)",
        "load_from(pair.teacher, 0)",
    ),
    "kernel of pairs: a teacher's vector begins at 16 bytes": (
        "csrc/cuda/vectors.h",
        "if (skew == 0) return low;",
        "return low;",
    ),
    "kernel of pairs: a teacher has one temperature": (
        "csrc/cuda/job.h",
        "return p.teacher_temperature ? logit_map",
        "return false ? logit_map",
    ),
    "kernel of pairs: the first settlement is not waited for": (
        "csrc/cuda/consumer.h",
        "if (job_.kFused) shared_.settled[index % kRowsAhead].wait(turn_at<kMode>(index, 0) & 1);",
        ";",
    ),
    "kernel of pairs: weights of 0 are multiplied": (
        "csrc/cuda/divergence.h",
        "if (slopes.weight == 0) return",
        "if (false) return",
    ),
}
"""By name: the file (``path_of``), a text of it, and what is in its place."""

TOPICS = {
    "ranks": "test_groups test_sequence_group",
    "temperature": "test_temperatures",
    "recorded": "test_recorded test_recorded_teacher",
    "vocabulary": "test_vocabulary",
    "prefix": "test_prefix_ratios",
    "kl to the sampler": "test_rollout_kl",
    "divergence": "test_divergence",
    "triton pairs": "test_divergence_triton",
    "weight of 0": "test_zero_weights",
    "support": "test_support",
    "gae": "test_advantages",
    "normalizer": "test_aggregation",
    "world size": "test_aggregation",
    "second backward": "test_autograd",
    "in place": "test_autograd",
    "direct slope dropped": "test_surrogates",
    "fp16": "test_linear",
    "linear": "test_linear",
    "kernel of rows": "test_cuda",
    "kernel of pairs": "test_divergence_cuda",
}
"""By how a name begins: the tests that are likeliest to notice, before those of the file's suite."""
