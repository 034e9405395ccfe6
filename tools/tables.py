"""Write the tables of README.md and docs/ from the results in benchmarks/results/.

    python -m tools.tables            # after a benchmark has written new results
    python -m tools.tables --check    # changes nothing; exits with 1 if a table differs from the results

A table stands between `<!-- table NAME -->` and `<!-- end -->`, where NAME is one of TABLES below.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import (
    attention,
    gemm,
    gemm_eight_bit,
    gemm_quantized,
    gemm_sweep,
    generate_report,
    nsys_report,
    quantize,
    rms_norm,
)
from benchmarks.common import OURS, READ_BANDWIDTH, RESULTS, short
from qwen_model.checkpoints.config import ModelConfig, read_config
from qwen_model.common.files import write_whole
from qwen_model.engine.plan import CARDS, fitting_cards, memory_plan
from qwen_model.interface.engine_config import Limits
from qwen_model.quantization.formats import own_formats
from qwen_model.quantization.options import QuantizationOptions

ROOT = Path(__file__).parent.parent
NOT_MEASURED = "*Not measured yet.*"


def read(name: str) -> Any:
    """Return the results in a file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def counted(number: int, what: str) -> str:
    """Return a number and a noun, in the plural where it should be."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def generation(prompt_tokens: int) -> str:
    """Return tokens per second and times to the first token, on an H200."""
    records, _ = generate_report.read_records(sorted(RESULTS.glob("generate_*.json")))
    return generate_report.table(records, prompt_tokens)


def h100_bandwidth() -> float:
    """Return the bytes per second that the fastest GEMM reads on the H100, the highest rate measured there."""
    products = {(name, p.name): p for name, model in gemm.MODELS.items() for p in (*model.products, model.head)}
    records = read("h100/gemm")["products"]
    return max(2 * products[r["model"], r["product"]].elements / min(r[OURS], r[gemm.CUBLAS]) for r in records) * 1e6


def generation_of_readme() -> str:
    """Return ours, vLLM and the floor in one shape, on an H100."""
    records, _ = generate_report.read_records(sorted((RESULTS / "h100").glob("generate_qwen2.5-7b_*.json")))
    return generate_report.table(records, 1024, h100_bandwidth(), names=("tensorrt", "qwen_model", "vllm", "floor"))


def generation_on_h100(prompt_tokens: int) -> str:
    """Return tokens per second and times to the first token, on an H100."""
    records, _ = generate_report.read_records(sorted((RESULTS / "h100").glob("generate_*.json")))
    return generate_report.table(records, prompt_tokens, h100_bandwidth())


def quantized_generation(prompt_tokens: int, gpu: str) -> str:
    """Return tokens per second and times to the first token by quantization, ours and vLLM's; gpu: h100 or h200."""
    records = []
    for kind in ("float16", "int8", "int4", "smoothquant", "fp8"):
        for path in sorted((RESULTS / gpu).glob(f"{kind}_*qwen2.5-7b_*.json")):
            records += json.loads(path.read_text(encoding="utf-8"))["results"]
    records = [r for r in records if r["prompt_tokens"] == prompt_tokens and r["implementation"] in IMPLEMENTATIONS]
    if not any("int4" in r["dtype"] for r in records):
        return NOT_MEASURED
    batches, rows = sorted({r["batch_size"] for r in records}), []
    for dtype, name in dict.fromkeys((r["dtype"], r["implementation"]) for r in records):
        here = {r["batch_size"]: r for r in records if (r["dtype"], r["implementation"]) == (dtype, name)}
        rates = [f"{here[n]['decode_tokens_per_second']:.0f}" if n in here else "" for n in batches]
        firsts = [f"{here[n]['first_token_ms']:.1f}" if n in here else "" for n in batches]
        rows.append([dtype, IMPLEMENTATIONS[name], *rates, *firsts])
    heads = [f"{what}, batch {n}" for what in ("tokens/s", "first token, ms") for n in batches]
    return markdown(["weights", "", *heads], rows)


IMPLEMENTATIONS = {"qwen_model": "**ours**", "vllm": "vLLM"}


def offline() -> str:
    """Return the throughput of many requests at once, ours and vLLM's."""
    if not (RESULTS / "h100" / "throughput_offline.json").exists():
        return NOT_MEASURED
    records = read("h100/throughput_offline")
    slowest = max(r["seconds"] for r in records)
    rows = [
        [
            IMPLEMENTATIONS[r["implementation"]],
            f"{r['seconds']:.1f}",
            f"{r['requests_per_second']:.1f}",
            f"{r['new_tokens_per_second']:,.0f}",
            f"{slowest / r['seconds']:.2f}",
        ]
        for r in records
    ]
    return markdown(["", "seconds", "requests/s", "new tokens/s", "times the slowest"], rows)


SERVING = ("serving", "serving_int4", "serving_fp8")


def serving_of_readme() -> str:
    """Return the new tokens per second of our server and vLLM's at saturation and for one user, on an H200."""
    loads, rows = ("fixed", "mixed", "alone"), []
    for name in SERVING:
        records = read(f"h200/{name}")
        rates = {
            (r["load"], r["implementation"]): f"{r['new_tokens_per_second']:,.0f}"
            for r in records
            if r["request_rate"] is None
        }
        cells = [" / ".join(rates.get((load, server), "–") for server in IMPLEMENTATIONS) for load in loads]
        rows.append([records[0]["dtype"], *cells])
    return markdown(["new tokens/s, **ours** / vLLM", "512 and 256 tokens", "mixed lengths", "one user"], rows)


def serving(gpu: str) -> str:
    """Return what a server gives at saturation, at rates and to one user, ours and vLLM's, by the kind of weights."""
    files = [f"{gpu}/{kind}" for kind in SERVING]
    rows = [row for name in files if (RESULTS / f"{name}.json").exists() for row in served(read(name))]
    heads = ["first token, ms: median / 99 %", "a token, ms: median / 99 %", "between events, ms: median / 99 %"]
    return markdown(["load", "weights", "", "new tokens/s", "of vLLM's", *heads], rows) if rows else NOT_MEASURED


def served(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return the rows of one kind of weights, with implementations under one load beside each other."""
    names = {**IMPLEMENTATIONS, "session": "**ours**, `Session.stream`"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        rate = record["request_rate"]
        load = record["load"] if rate is None else f"{record['load']}, {rate:.1f} requests/s"
        groups.setdefault(load, []).append(record)
    rows = []
    for load, here in sorted(groups.items()):
        others = [record["new_tokens_per_second"] for record in here if record["implementation"] == "vllm"]
        for record in here:
            spread = [
                "" if record[f"{name}_p50"] is None else f"{record[f'{name}_p50']:.1f} / {record[f'{name}_p99']:.1f}"
                for name in ("first_token", "per_token", "between_events")
            ]
            rate = record["new_tokens_per_second"]
            share = f"{rate / others[0]:.2f}" if others and record["implementation"] != "vllm" else ""
            rows.append([load, record["dtype"], names[record["implementation"]], f"{rate:,.0f}", share, *spread])
    return rows


def build_times() -> str:
    """Return the seconds and the memory that building from a quantized checkpoint takes, on an H200's host."""
    rows = [
        [
            f"{record['shape']}, int4, {record['checkpoint']}",
            record["backend"],
            f"{record['seconds']:.0f}",
            f"{record['weights'] / 1024:.1f}",
            f"{record['anonymous'] / 1024:.1f}",
            f"{record['resident'] / 1024:.1f}",
        ]
        for record in read("h200/build_times")
    ]
    heads = ["checkpoint", "back end", "seconds", "checkpoint, GiB", "memory at most, GiB", "with mapped files, GiB"]
    return markdown(heads, rows)


def kinds_of_caches() -> str:
    """Return what pages cost and what caches of 8 bits save attention, on an H100."""
    if not (RESULTS / "h100" / "attention.json").exists():
        return NOT_MEASURED
    records = read("h100/attention")["records"]
    return "\n\n".join(f"{phase}:\n\n{attention.cache_table(records, phase)}" for phase in ("decode", "prefill"))


def quantized_rows() -> str:
    """Return the time of quantizing rows to 8 bits, ours, vLLM's and a copy, on an H100."""
    if not (RESULTS / "h100" / "quantize.json").exists():
        return NOT_MEASURED
    records = read("h100/quantize")["records"]
    return "\n\n".join(quantize.table(records, columns) for columns in sorted({r["columns"] for r in records}))


def products_of_quantized_weights() -> str:
    """Return the floor's share and the lead over others of GEMMs of quantized weights, up to 64 rows, on an H200."""
    records = read("h200/gemm_quantized")
    steps = [record for record in records if record["rows"] <= gemm_quantized.MAX_STEP_ROWS]
    return f"{gemm_quantized.steps_table(steps, READ_BANDWIDTH)}\n\n{gemm_quantized.summary(steps)}"


def quantized_products_of_prompts() -> str:
    """Return the time of GEMMs of quantized weights over that of 16-bit ones, and list where another is faster."""
    records = read("h200/gemm_quantized")
    prompts = [record for record in records if record["rows"] > gemm_quantized.MAX_STEP_ROWS]
    listed = gemm_quantized.summary(prompts, gemm_quantized.PEERS)
    return f"{gemm_quantized.prompts_table(prompts)}\n\n{listed}"


def times_of_quantized_prompts(weight_format: str) -> str:
    """Return the time of GEMMs of quantized weights beside 16-bit ones, for prompts, on an H200."""
    records = read("h200/gemm_quantized")
    layers = gemm_quantized.by_layer([r for r in records if r["format"] == weight_format])
    counts = gemm_quantized.PROMPT_ROWS
    rows = []
    for (layer, _), here in layers.items():
        if here.keys() >= set(counts):  # the output projection has one row for each sequence
            plain = {n: min(here[n][gemm_quantized.OURS_16_BIT], here[n][gemm.CUBLAS]) for n in counts}
            rows.append([layer, *(f"{short(here[n][OURS])} / {short(plain[n])}" for n in counts)])
    return markdown(["layer", *(f"{count} rows" for count in counts)], rows)


def products_of_prompts() -> str:
    """Return GEMMs of more rows than decoding has, ours and cuBLAS, on an H100, and list where cuBLAS is faster."""
    results = read("h100/gemm")
    records, lines = results["products"], []
    products = [(name, product) for name, model in gemm.MODELS.items() for product in model.products]
    for count in sorted({r["rows"] for r in records if r["rows"] > max(gemm.STEP_ROWS)}):
        found = [gemm.find(records, name, product.name, count) for name, product in products]
        lines.append([str(count), *(f"{short(r[OURS])} / {short(r[gemm.CUBLAS])}" for r in found)])
    table = markdown(["rows", *(f"{name} {product.name}" for name, product in products)], lines)
    return f"{table}\n\n{gemm.summary(results)}"


def generation_of_engines() -> str:
    """Return tokens per second of an engine with all plug-ins and with one of them switched off."""
    records, _ = generate_report.read_records(sorted(RESULTS.glob("generate_*.json")))
    records = [r for r in records if (r["shape"], r["prompt_tokens"]) == ("qwen-7b", 128)]
    return generate_report.table(records, 128, names=("tensorrt", "native_norms", "native_rotary", "native_gemm"))


def gemm_shares(name_of_results: str, bandwidth: float) -> str:
    """Return the share of `bandwidth`, in bytes per second, at which GEMMs read their weights."""
    results, rows = read(name_of_results), []
    for name, model in gemm.MODELS.items():
        for product in (*model.products, model.head):
            found = [gemm.find(results["products"], name, product.name, count) for count in (1, 8, 64)]
            label = f"{name} {product.name}, {product.in_features} to {product.out_features}"
            rows.append([label, *shares(product.floor(bandwidth), found)])
        steps = [next(s for s in results["steps"] if (s["model"], s["rows"]) == (name, n)) for n in (1, 8, 64)]
        rows.append([f"all GEMMs and norms of a step, {name}", *shares(model.floor(bandwidth), steps)])
    return markdown(["", "1 row", "8 rows", "64 rows", "cuBLAS: 1 row", "8 rows", "64 rows"], rows)


def shares(floor: float, records: list[dict[str, Any]]) -> list[str]:
    """Return the floor's share of the time of ours, then of cuBLAS."""
    ours = [f"**{floor / r[OURS]:.0%}**" for r in records]
    return ours + [f"{floor / r[gemm.CUBLAS]:.0%}" for r in records]


def rms_norm_excerpt() -> str:
    """Return RMSNorm by ours and the best other provider, at hidden size 4096."""
    records, rows = read("rms_norm_float16")["records"], []
    sizes = (1, 64, 1024, 8192)
    for operation in rms_norm.OPERATIONS:
        cells = []
        for tokens in sizes:
            here = [r for r in records if rms_norm.matches(r, operation, 4096, tokens) and "microseconds" in r]
            times = {r["provider"]: r["microseconds"] for r in here}
            peers = {p: t for p, t in times.items() if not p.startswith(OURS) and p != "copy_"}
            best = min(peers, key=lambda name: peers[name])
            cells.append(f"**{short(times[OURS])}** / {short(peers[best])} {best}")
        rows.append([operation, *cells])
    return markdown(["ours / best of the others", *(counted(n, "token") for n in sizes)], rows)


def rms_norm_tables() -> str:
    """Return all sizes and providers of RMSNorm."""
    results = read("rms_norm_float16")
    sizes = sorted({r["hidden_size"] for r in results["records"]})
    parts = [
        f"### hidden size {size}, float16, microseconds\n\n{rms_norm.tables(results['records'], size)}"
        for size in sizes
    ]
    return "\n".join([*parts, rms_norm.summary(results["records"])])


def tensorrt_rms_norm() -> str:
    """Return RMSNorm in TensorRT engines: the plug-in, native layers and their ratio, in chains."""
    results, rows = [r for r in read("tensorrt_rms_norm") if r["operation"]], []
    sizes = sorted({r["tokens"] for r in results})
    for operation in dict.fromkeys(r["operation"] for r in results):
        cells = []
        for tokens in sizes:
            here = [r for r in results if (r["operation"], r["tokens"]) == (operation, tokens)]
            layers = max(r["layers"] for r in here)
            times = {r["implementation"]: r["microseconds"] for r in here if r["layers"] == layers}
            ratio = times["native"] / times["plugin"]
            cells.append(f"**{short(times['plugin'])}** / {short(times['native'])} ({ratio:.1f} x)")
        rows.append([operation.replace("_", " "), *cells])
    return markdown(["plug-in / native layers", *(counted(n, "token") for n in sizes)], rows)


def tensorrt_gemm() -> str:
    """Return GEMMs in TensorRT engines: time, error and seconds to build, of native layers and the plug-in."""
    if not (RESULTS / "tensorrt_gemm.json").exists():
        return NOT_MEASURED
    results, rows = read("tensorrt_gemm"), []
    for shape in dict.fromkeys((r["in_features"], r["out_features"], r["rows"]) for r in results):
        here = {r["implementation"]: r for r in results if (r["in_features"], r["out_features"], r["rows"]) == shape}
        cells = []
        for name in ("native", "plugin"):
            record = here[name]
            cells += (
                [record["error"], "", ""]
                if "error" in record
                else [
                    short(record["microseconds"]),
                    f"{record['largest_error']:.1g}",
                    f"{record['build_seconds']:.0f}",
                ]
            )
        rows.append([f"[{shape[2]}, {shape[0]}] · [{shape[0]}, {shape[1]}]", *cells])
    head = ["product", "native: us", "largest error", "build, s", "plug-in: us", "largest error", "build, s"]
    return markdown(head, rows)


def sampling(name_of_results: str) -> str:
    """Return sampling by operation, batch size and implementation."""
    if not (RESULTS / f"{name_of_results}.json").exists():
        return NOT_MEASURED
    results = read(name_of_results)
    batches = sorted({r["batch_size"] for r in results})
    providers = list(dict.fromkeys(r["implementation"] for r in results))
    times = {(r["operation"], r["batch_size"], r["implementation"]): r["microseconds"] for r in results}
    head = ["microseconds", *(f"batch {n}: {p}" for n in batches for p in providers)]
    return markdown(
        head,
        [
            [operation, *(short(times.get((operation, n, p))) for n in batches for p in providers)]
            for operation in dict.fromkeys(r["operation"] for r in results)
        ],
    )


def decode_step(results: str) -> str:
    """Return the microseconds of a decode step by kind of kernel, beside its floor; results: of a file."""
    if not (RESULTS / f"{results}.json").exists():
        return NOT_MEASURED
    recordings = read(results)
    names = {
        "GEMMs": ("products",),
        "attention": ("attention",),
        "norms": ("norms",),
        "SwiGLU on its own": ("SwiGLU",),
        "sampling, embedding, copies": ("sampling", "embedding", "copies", "other"),
        "idle": ("gaps",),
    }
    rows = [
        ["**step**, replayed without a profiler", *(f"**{r['microseconds_per_step']:.0f}**" for r in recordings)],
        ["floor: weights and cache once at 4.55 TB/s", *(f"{r['floor_microseconds']:.0f}" for r in recordings)],
    ]
    for name, kinds in names.items():
        sums = [sum(r["microseconds_by_kind_traced"].get(kind, 0.0) for kind in kinds) for r in recordings]
        rows.append([name, *(f"{value:.0f}" if value else "–" for value in sums)])
    return markdown(["microseconds", *(f"batch {r['batch_size']}" for r in recordings)], rows)


def quantization_quality() -> str:
    """Return what each quantization does to the packaged model, without and with outliers."""
    if not (RESULTS / "quantization.json").exists():
        return NOT_MEASURED
    records = read("quantization")
    models = sorted({r["model"] for r in records})
    found = {(r["method"], r["model"]): r for r in records}
    rows = []
    for method in dict.fromkeys(r["method"] for r in records):
        cells = [f"{found[method, models[0]]['bits']:.2f}"] if method != "not quantized" else [""]
        for model in models:
            record, plain = found[method, model], found["not quantized", model]
            lost = f" ({record['perplexity'] / plain['perplexity'] - 1:+.2%})" if record is not plain else ""
            cells.append(f"{record['perplexity']:.3f}{lost}")
            kinds = () if record is plain else ("divergence", "largest_divergence")
            cells.append(", ".join(f"{1000 * record[kind]:,.2f}" for kind in kinds))
        rows.append([method, *cells])
    heads = [head for model in models for head in (f"perplexity, {model}", "divergence: mean, largest")]
    return markdown(["quantization", "bits", *heads], rows)


MEMORY_FORMATS = {"16 bit": None, "int8": QuantizationOptions("int8"), "int4": QuantizationOptions("int4")}
PROMPT, OUTPUT = 3584, 512
"""The tokens of a sequence in the table of memory."""


def published_model(sizes: str) -> ModelConfig:
    """Return a model by its hidden and MLP sizes, layers, heads, key-value heads, vocabulary and whether it is tied."""
    hidden, inner, layers, heads, kv_heads, vocabulary, *tied = sizes.split()
    return read_config(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_size": int(hidden),
            "intermediate_size": int(inner),
            "num_hidden_layers": int(layers),
            "num_attention_heads": int(heads),
            "num_key_value_heads": int(kv_heads),
            "vocab_size": int(vocabulary),
            "max_position_embeddings": 32768,
            "tie_word_embeddings": bool(tied),
        }
    )


PUBLISHED_MODELS = {
    "Qwen2.5-1.5B": "1536 8960 28 12 2 151936 tied",
    "Qwen2.5-3B": "2048 11008 36 16 2 151936 tied",
    "Qwen2.5-7B": "3584 18944 28 28 4 152064",
    "Qwen2.5-14B": "5120 13824 48 40 8 152064",
    "Qwen2.5-32B": "5120 27648 64 40 8 152064",
    "Qwen2.5-72B": "8192 29568 80 64 8 152064",
}


def quantization_memory() -> str:
    """Return how many sequences have room on cards of some sizes, by model and format."""
    limits = Limits(max_batch_size=64, max_input_len=PROMPT, max_output_len=OUTPUT)
    rows = []
    for name, sizes in PUBLISHED_MODELS.items():
        model = published_model(sizes)
        for text, options in MEMORY_FORMATS.items():
            formats = {} if options is None else own_formats(options, model, "float16")
            plan = memory_plan(model, limits, "float16", formats)
            counts = [str(count) if count else "–" for count in fitting_cards(plan).values()]
            rows.append([name, text, f"{plan.weight_bytes / 1e9:.2f}", f"{plan.token_bytes / 1024:.0f}", *counts])
    return markdown(["model", "weights", "GB", "KiB a token", *(f"{card} GB" for card in CARDS)], rows)


def measured() -> str:
    """Return which GPU and commit each file of results is from."""
    rows = []
    for path in sorted(RESULTS.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        machine, versions = content["machine"], content.get("versions", content["machine"])
        library = next((f"{name} {versions[name]}" for name in ("torch", "tensorrt") if name in versions), "")
        commit = content.get("commit") or machine["commit"]
        rows.append(
            [
                path.relative_to(RESULTS).as_posix(),
                (machine["gpu"] or machine["cpu"]).split(",")[0],
                library,
                f"`{commit[:7]}`",
            ]
        )
    return markdown(["file", "GPU", "with", "ran at"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "generation-readme": generation_of_readme,
    "generation-128": lambda: generation(128),
    "generation-1024": lambda: generation(1024),
    "generation-128-h100": lambda: generation_on_h100(128),
    "generation-1024-h100": lambda: generation_on_h100(1024),
    "generation-engines": generation_of_engines,
    "quantized-128-h100": lambda: quantized_generation(128, "h100"),
    "quantized-1024-h100": lambda: quantized_generation(1024, "h100"),
    "quantized-128-h200": lambda: quantized_generation(128, "h200"),
    "quantized-1024-h200": lambda: quantized_generation(1024, "h200"),
    "offline-h100": offline,
    "gemm-eight-bit-h100": lambda: gemm_eight_bit.tables(read("h100/gemm_eight_bit"), h100_bandwidth()),
    "gemm-eight-bit-h200": lambda: gemm_eight_bit.tables(read("h200/gemm_eight_bit"), READ_BANDWIDTH),
    "gemm-quantized-h200": products_of_quantized_weights,
    "gemm-quantized-prompts-h200": quantized_products_of_prompts,
    "gemm-quantized-times-h200": lambda: times_of_quantized_prompts("int4"),
    "serving-readme": serving_of_readme,
    "serving-h100": lambda: serving("h100"),
    "serving-h200": lambda: serving("h200"),
    "build-times-h200": build_times,
    "attention-caches-h100": kinds_of_caches,
    "quantize-h100": quantized_rows,
    "gemm-shares": lambda: gemm_shares("gemm", READ_BANDWIDTH),
    "gemm-shares-h100": lambda: gemm_shares("h100/gemm", h100_bandwidth()),
    "gemm": lambda: f"{gemm.tables(read('gemm'), READ_BANDWIDTH)}\n{gemm.summary(read('gemm'))}",
    "gemm-prompts": products_of_prompts,
    "gemm-sweep": lambda: (
        f"{gemm_sweep.shares_table(read('gemm_sweep'), READ_BANDWIDTH)}\n\n{gemm_sweep.summary(read('gemm_sweep'))}"
    ),
    "gemm-sweep-worst": lambda: gemm_sweep.worst_table(read("gemm_sweep"), READ_BANDWIDTH),
    "attention": lambda: attention.tables(read("attention")["records"]),
    "rms_norm-excerpt": rms_norm_excerpt,
    "rms_norm": rms_norm_tables,
    "tensorrt_rms_norm": tensorrt_rms_norm,
    "tensorrt_gemm": tensorrt_gemm,
    "sampling": lambda: sampling("sampling"),
    "sampling-h100": lambda: sampling("h100/sampling"),
    "decode_step": lambda: decode_step("decode_timeline"),
    "decode-step-int4-h200": lambda: decode_step("h200/decode_timeline_int4"),
    "nsys": lambda: nsys_report.table(read("nsys")),
    "nsys-layers": lambda: nsys_report.layer_table(read("nsys")),
    "quantization-quality": quantization_quality,
    "quantization-memory": quantization_memory,
    "measured": measured,
}
PLACE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    found = {match[2] for text in texts.values() for match in PLACE.finditer(text)}
    if found != TABLES.keys():
        missing, unknown = sorted(TABLES.keys() - found), sorted(found - TABLES.keys())
        sys.exit(f"tables that no page has: {missing}; unknown tables in pages: {unknown}")
    stale = []
    for path, text in texts.items():
        new = PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]().rstrip()}\n{match[3]}", text)
        if new == text:
            continue
        stale.append(path.name)
        if not options.check:
            write_whole(path, new.encode())
    if options.check and stale:
        sys.exit(f"tables differ from the results: {', '.join(stale)}; run python -m tools.tables")
    print("written:" if stale else "nothing to change", *stale)


if __name__ == "__main__":
    main()
