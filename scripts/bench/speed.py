"""Times the denoising step, the scoring pass and whole requests at the shapes of --model.

Random weights, in bfloat16 or 8 bits, joint encoding of K = 4 chunks of 1,024, a query of 32
tokens; draft and scores are counted. Whole requests are timed as a user calls them, host time
included, after a first call that compiles; the baselines run in the same process. The sections run
in every format of the weights, and in each on every mesh with every way to make its sums.

Random weights have no retrieval heads. The scorer "heads" is given heads of layer --head-layers,
which its pass runs up to; which heads they are costs nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import pdllm_jax as pdllm
from bench.ahead import Programs
from bench.profiling import kernels
from bench.record import clock, copy_bandwidth, peak, spread
from bench.run import BLOCK, MODEL_OPTIONS, PREFIX, QUERY, Run, draw, random_layers
from pdllm_jax.compilation import enable_compilation_cache
from pdllm_jax.engine.request import request_keys
from pdllm_jax.method.cache import ChunkCache, ChunkPool
from pdllm_jax.method.caches import cache_method
from pdllm_jax.method.scorers import SCORERS
from pdllm_jax.method.scoring import draft_response
from pdllm_jax.network.sharding import TENSOR, parse_mesh, place

BASELINES = ("dual-cache", "plain")
# Evaluations of "plain" that are timed, at least one a block. All are the same work: the others
# count as much as these.
PLAIN_EVALUATIONS = 2
SLOW = 3.0  # seconds; of a request that was compiled ahead the first call then counts


def main(args: argparse.Namespace) -> None:
    """Runs the sections in every format of the weights, on every mesh."""
    enable_compilation_cache()
    copied = copy_bandwidth(0.01 if args.tiny else 2.0, 2 if args.tiny else 50)
    run = Run(args)
    run.record |= {"copy_bandwidth": copied, "step": [], "end_to_end": [], "stream": []}
    run.record |= {"profile": []} if args.profile else {}
    if "heads" in selections(run):
        run.record["notes"] = "Scorer heads: the number of layers is given, not calibrated."
    for _ in run.formats():
        one_device = run.model
        for mesh, sums in meshes(args):
            if mesh is not None:
                run.model = one_device  # frees the weights on the mesh before
                run.model = pdllm.shard_model(one_device, mesh, sums=sums)
            if args.compile_ahead and mesh is None:
                compile_ahead(run)
            run.sections(SECTIONS, args.sections)
        jax.clear_caches()  # frees device memory


def compile_ahead(run: Run) -> None:
    """Compiles the programs of steps and requests side by side; the scoring pass is in these."""
    programs, sections = Programs(), run.args.sections
    if "end-to-end" in sections:
        requests, fitting = Requests(run), cases(run)
        found = programs.find(functools.partial(requests.answer, case) for case in fitting)
        run.programs = programs, dict(zip(fitting, found, strict=True))
    if "step" in sections:
        steps = Steps(run)
        programs.find(lambda k=k: steps.loop(steps.start(k)) for k in run.args.cached)
    spent, _ = clock(programs.compile)
    run.record["compile_seconds"][f"{len(programs)} programs side by side{run.on}"] = spent
    run.say(f"{len(programs)} programs compiled{run.on}: {spent:.0f} s")


def selections(run: Run) -> dict[str, pdllm.SelectionConfig]:
    """Returns the settings of --scorers by name; without any, of the model's default alone."""
    config, layers, default = run.model.config, run.args.head_layers, run.select.scorer
    names = run.args.scorers or [default.name]
    scorers: dict[str, Any] = dict(zip(names, names, strict=True)) | {default.name: default}
    if "heads" in names:
        if layers is None or not 1 <= layers <= config.n_layers:
            raise ValueError(f"--head-layers must be 1 to {config.n_layers}, got {layers}")
        heads = tuple((layers - 1, head) for head in range(min(4, config.n_heads)))
        scorers["heads"] = SCORERS["heads"](heads=heads)
    return {name: dataclasses.replace(run.select, scorer=scorers[name]) for name in names}


def meshes(args: argparse.Namespace) -> Iterator[tuple[Mesh | None, Any]]:
    """Yields the meshes to run on with the ways to make their sums, where there are several."""
    for name in args.mesh or [None]:
        mesh = None if name is None else pdllm.make_mesh(*parse_mesh(name))
        alone = mesh is None or mesh.shape[TENSOR] == 1
        yield from ((mesh, sums) for sums in ((None,) if alone else args.sums or (None,)))


def weight_bytes(run: Run) -> int:
    """Returns the bytes of weights that an evaluation reads: of the embedding only single rows."""
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(run.model, nnx.Param)))
    total = sum(leaf.nbytes for leaf in leaves)
    tied = run.model.config.weight_tying
    return total if tied else total - run.model.embedding.weight[...].nbytes


def random_document(run: Run, chunks: int) -> ChunkCache:
    """Returns a cache of that many full chunks, its KV random."""
    config, size, prompt = run.model.config, run.args.chunk_size, run.prompt(chunks)
    shape = (config.n_layers, chunks, config.n_kv_heads, size, config.head_dim)

    k, v = (random_layers(shape, jax.random.key(side)) for side in (1, 2))
    pool = ChunkPool(k, v, jnp.full((chunks,), size))
    prefix_shape = (config.n_layers, 1, PREFIX, config.n_kv_heads, config.head_dim)
    prefix = jnp.zeros(prefix_shape, jnp.bfloat16)
    ids = (prompt.chunks[:, :chunks], prompt.chunk_lengths[:, :chunks])
    ids += (prompt.prefix, prompt.prefix_length)
    return place(run.model.mesh, ChunkCache(pool, *ids, prefix, prefix))


class Steps:
    """Evaluations of 32 rows against K of a document's chunks."""

    def __init__(self, run: Run):
        self.run, self.most = run, max(run.args.cached)
        self.cache, self.prompt = random_document(run, self.most), run.prompt(self.most)
        self.decode = pdllm.DecodeConfig(gen_length=BLOCK, block_length=BLOCK)

    def start(self, k: int) -> Any:
        """Returns the state after joint encoding of k chunks: the KV of the live rows is fresh."""
        model, prompt, key = self.run.model, self.prompt, jax.random.key(0)
        chosen = pdllm.select_top_k(-jnp.arange(self.most, dtype=jnp.float32)[None], k)
        settings: Any = {"query_length": prompt.query_length, "encoding": "independent"}
        inputs = self.cache, chosen, prompt.query, self.decode, key
        state = pdllm.init_denoise(model, *inputs, **settings)
        state = dataclasses.replace(state, stale=jnp.zeros((1,), bool), live_encoded=True)
        return jax.block_until_ready(place(model.mesh, state))

    def loop(self, state: Any) -> float:
        """Returns the seconds of a step in the loop on the device."""
        run = functools.partial(pdllm.denoise, self.run.model, self.cache, config=self.decode)
        return clock(lambda: run(state).tokens)[0] / BLOCK

    def from_python(self, state: Any) -> float:
        """Returns the seconds of a step that Python calls."""
        one = functools.partial(pdllm.denoise_step, self.run.model, self.cache, config=self.decode)
        state = jax.block_until_ready(one(state))

        def others() -> Any:
            nonlocal state
            for _ in range(BLOCK - 1):
                state = one(state)
            return state.tokens

        return clock(others)[0] / (BLOCK - 1)


def step(run: Run) -> None:
    """Times one evaluation of 32 rows against K chunks: in the loop on the device, from Python."""
    steps, mesh, args = Steps(run), run.model.mesh, run.args
    parts = 1 if mesh is None else mesh.shape[TENSOR]
    chunk_bytes = (steps.cache.pool.k.nbytes + steps.cache.pool.v.nbytes) // steps.most
    for k in args.cached:
        steps.loop(steps.start(k))  # compiles
        spent = [1e3 * steps.loop(steps.start(k)) for _ in range(args.repeats + 1)][1:]
        called = [1e3 * steps.from_python(steps.start(k)) for _ in range(args.repeats)]
        python, name = float(np.median(called)), f"step, {k * args.chunk_size} cached"
        floor = (weight_bytes(run) + k * chunk_bytes) / parts / run.record["copy_bandwidth"] * 1e3
        row = {**run.of_model, "chunks": k, "cached_tokens": k * args.chunk_size, "rows": BLOCK}
        row |= spread(spent, ("ms", "ms_least", "ms_most"))
        row |= {"ms_floor": floor, "times_floor": row["ms"] / floor, "ms_from_python": python}
        run.record["step"].append({**row, "python_over_loop": python / row["ms"]})
        run.say(
            f"{name}{run.on}: {row['ms']:.3f} ms [{row['ms_least']:.3f}, {row['ms_most']:.3f}], "
            f"{row['times_floor']:.3f} times the floor; from Python {row['ms_from_python']:.3f}"
        )
        state = steps.start(k)
        profile(run, name, lambda state=state: steps.loop(state), BLOCK)


def pass_flops(run: Run, chunks: int, scorer: Any) -> float:
    """Returns the floating-point operations of encoding and scoring, padding not counted.

    Products of every row with the layers' weights, attention of chunk rows over prefix and chunk,
    and the question: each copy over prefix, chunk and itself, and the LM head over its rows; of the
    scorer "heads" over prefix, all chunks and itself. In the last layer chunks have keys and
    values alone, with "heads" keys alone.
    """
    config, size = run.model.config, run.args.chunk_size
    model, kv = config.d_model, config.n_kv_heads * config.head_dim
    rows, pairs = PREFIX + chunks * size, PREFIX**2 + chunks * size * (PREFIX + size)
    layers, rest = config.n_layers, 0
    layer = 2 * model * (2 * model + 2 * kv + 3 * config.mlp_hidden_size)
    if scorer.in_pass:
        drafted, filled = (getattr(scorer, f"draft_{x}", 0) for x in ("length", "steps"))
        own = chunks * getattr(scorer, "masked_copies", 1) * (QUERY + drafted)
        seen = own * (PREFIX + size + QUERY + drafted)
        rest = 2 * model * config.vocab_size * chunks * (QUERY + filled)
        rest += own * layer + 4 * model * seen + rows * 2 * model * 2 * kv
        layers, rows, pairs = layers - 1, rows + own, pairs + seen
    else:
        layers, rest = run.args.head_layers - 1, 2 * model * kv * rows
        rows, pairs = rows + QUERY, pairs + QUERY * (PREFIX + chunks * size + QUERY)
    return layers * (rows * layer + 4 * model * pairs) + rest


def score_document(run: Run) -> None:
    """Times the scoring of a document as joint encoding needs it, the draft apart; TFLOP/s."""
    chunks = max(run.args.documents)
    prompt = run.prompt(chunks)
    for scorer, select in selections(run).items():
        by = f", {scorer}" * (scorer != run.select.scorer.name)
        name, config = f"score {chunks} chunks{by}", select.scoring()
        drafted = draft_response(run.model, prompt, config)
        if drafted is not None:
            run.timed(f"draft{by}", lambda c=config: draft_response(run.model, prompt, c))
        # The arguments of an answer, so that the program is the same.
        inputs: dict[str, Any] = {"draft": drafted, "key": request_keys([0], 1), "oracle": None}
        passing = select.for_prefill(streaming=False)
        score = functools.partial(pdllm.prefill, run.model, prompt, passing, **inputs)
        run.timed(name, lambda score=score: score()[1])
        profile(run, name, score)
        if select.scorer.in_pass or scorer == "heads":
            work = pass_flops(run, chunks, select.scorer)
            run.note(f"TFLOP/s, {name}", work / run.median(name) / 1e12)


def profile(run: Run, name: str, call: Any, calls: int = 1) -> None:
    """With --profile records the kernels that a call spends its time in, per each of `calls`."""
    if run.args.profile:
        rows = kernels(call, calls)
        run.record["profile"] += [{**run.of_model, "program": name, **row} for row in rows]
        run.say(f"profile of {name}{run.on}: {len(rows)} rows")


class Case(NamedTuple):
    """A request to time: its tokens in chunks, tokens of the response, how it is answered."""

    chunks: int
    tokens: int
    method: str = "prefilling"
    scorer: str | None = None

    @property
    def name(self) -> str:
        """The method, and its scorer."""
        return self.method if self.scorer is None else f"{self.method}, {self.scorer}"

    @property
    def length(self) -> str:
        """The prompt and the response."""
        return f"{self.chunks} chunks, {self.tokens} tokens"

    @property
    def steps(self) -> int:
        """Evaluations that are timed."""
        fewest = max(PLAIN_EVALUATIONS, self.tokens // BLOCK)
        return fewest if self.method == "plain" else self.tokens


def cases(run: Run) -> list[Case]:
    """Returns the requests of the command line: for each length ours, then the baselines.

    What the device cannot hold is noted in the record and left out.
    """
    if run.on in run.fitting:
        return run.fitting[run.on]
    requests, fitting = Requests(run), run.fitting.setdefault(run.on, [])
    for case in asked(run):
        try:
            engine, request = requests.engine(case)
            engine.check([request])
            fitting.append(case)
        except ValueError as reason:
            run.record["left_out"].append(f"{case.name}, {case.length}: {reason}")
            run.say(run.record["left_out"][-1])
    return fitting


def asked(run: Run) -> list[Case]:
    """Returns the requests of the command line, whether the device can hold them or not."""
    args = run.args
    lengths = [(n, tokens) for n in args.documents for tokens in args.tokens]
    if args.requests:
        lengths = [(int(n), int(tokens)) for n, tokens in (x.split("x") for x in args.requests)]
    methods = [("prefilling", scorer) for scorer in selections(run)]
    methods += [(str(cache_method(name)), None) for name in args.methods or BASELINES]
    return [Case(*length, *method) for length in lengths for method in methods]


class Requests:
    """Random requests. Whole prompts have n times C tokens: baselines compute no padding."""

    def __init__(self, run: Run):
        self.run, self.rng, self.select = run, np.random.default_rng(0), selections(run)
        self.prefix, self.query = self.draw(PREFIX), self.draw(QUERY)
        size = run.args.chunk_size
        self.contexts = {
            n: self.draw(n * size - PREFIX - QUERY)
            for n in dict.fromkeys(case.chunks for case in asked(run))
        }

    def draw(self, length: int) -> np.ndarray:
        return draw(self.rng, self.run.model.config, length)

    def engine(
        self, case: Case, context: np.ndarray | None = None, **select: Any
    ) -> tuple[pdllm.Engine, pdllm.Request]:
        """Returns what answers the case, and the request.

        One token a step; for "plain" the fewest steps. context: instead of the case's.
        select: changes of the settings.
        """
        context, tokens = self.contexts[case.chunks] if context is None else context, case.tokens
        decode = pdllm.DecodeConfig(gen_length=tokens, block_length=BLOCK, steps=case.steps)
        settings: dict[str, Any] = {"decoding": decode, "method": case.method}
        request = [[], np.concatenate([self.prefix, context, self.query])]
        prefix = self.prefix[:0]
        if case.scorer is not None:
            settings["selection"] = dataclasses.replace(self.select[case.scorer], **select)
            settings["chunking"] = pdllm.ChunkConfig(self.run.args.chunk_size)
            request, prefix = [context, self.query], self.prefix
        return pdllm.Engine(self.run.model, **settings), pdllm.Request(*request, prefix)

    def answer(self, case: Case, context: np.ndarray | None = None, **select: Any):
        """Answers once, see `engine`; returns the seconds of all evaluations, and the result."""
        engine, request = self.engine(case, context, **select)
        seconds, result = clock(lambda: engine.answer(**request._asdict()))
        if result.evaluations != case.steps:
            raise AssertionError(f"{result.evaluations} evaluations instead of {case.steps}")
        return seconds + result.timings["decode"] * (case.tokens / case.steps - 1), result


def end_to_end(run: Run) -> None:
    """Times whole requests by each method; records how many times longer each baseline takes."""
    requests = Requests(run)
    for length, group in itertools.groupby(cases(run), key=lambda case: case.length):
        if run.late(length):
            continue
        same = list(group)
        spent, first = clock(lambda same=same: {case: requests.answer(case) for case in same})
        run.record["compile_seconds"][f"{length}, first calls{run.on}"] = spent
        run.say(f"first calls, {length}: {spent:.0f} s")
        ours: dict[str, float] = {}
        for case in same:
            repeats = run.args.repeats if case.scorer else 1  # baselines take longest
            slow = run.programs is not None and first[case][0] > SLOW
            answers = [first[case] if slow else requests.answer(case) for _ in range(repeats)]
            result, prompt = answers[-1][1], case.chunks * run.args.chunk_size
            row = {**run.of_model, **case._asdict(), "prompt_tokens": prompt}
            row |= spread([spent for spent, _ in answers], ("seconds", "least", "most"))
            row |= {"phases": result.timings, "paths": result.paths}
            row |= {"rows": result.rows * case.tokens / case.steps}
            row |= {"head_layers": run.args.head_layers} if case.scorer == "heads" else {}
            if run.programs is not None:
                row["bytes"] = run.programs[0].peak(run.programs[1][case])
            run.record["end_to_end"].append({**row, "evaluations_timed": result.evaluations})
            run.say(f"{case.name:24} {length}{run.on} {row['seconds']:8.3f} s")
            if case.scorer:
                ours[case.name] = row["seconds"]
                continue
            for name, seconds in ours.items():
                run.note(f"{case.name} over {name}, {length}", row["seconds"] / seconds)


def stream(run: Run) -> None:
    """Times one request about each streamed document, compiling taken off; the device's peak."""
    requests = Requests(run)
    for chunks in run.args.stream:
        context = requests.draw(chunks * (run.args.chunk_size - 1))
        case = Case(chunks, BLOCK, scorer=next(iter(requests.select)))
        seconds, result = requests.answer(case, context, encoding="independent")
        spent = {"seconds": seconds - result.timings["compile"], "phases": result.timings}
        row = {**run.of_model, "chunks": chunks, "document_tokens": len(context), "tokens": BLOCK}
        run.record["stream"].append({**row, **spent, "peak_bytes": peak()})
        gigabytes = f"{peak() / 1e9:.2f} GB"
        run.say(f"streamed {len(context):,} tokens: {spent['seconds']:.1f} s, peak {gigabytes}")


SECTIONS = {"step": step, "prefill": score_document, "end-to-end": end_to_end, "stream": stream}
OPTIONS = MODEL_OPTIONS | {
    "--sections": (tuple(SECTIONS), ""),
    "--cached": ([4, 8, 32], "step: chunks attended to"),
    "--documents": ([8, 16, 32], "chunks of documents"),
    "--stream": ([128, 1024], "chunks of streamed ones"),
    "--tokens": ([32, 128], "of a response"),
    "--requests": ([str], "CHUNKSxTOKENS, instead of every document with every response"),
    "--scorers": ([str], "of our requests and of the scoring pass (default: the model's)"),
    "--head-layers": (int, 'layers that the scorer "heads" is given'),
    "--methods": ([str], "on the whole prompt, NAME[:SETTING=VALUE..] (default: dual-cache plain)"),
    "--compile-ahead": (False, "compile all requests' programs side by side, then time"),
    "--profile": (False, "record the kernels that a step and a scoring pass spend their time in"),
    "--mesh": ([str], "meshes DATAxTENSOR, e.g. 1x1 1x2 2x1"),
    "--sums": ([str], "what adds up a few rows over TENSOR (default: the model's choice)"),
}
