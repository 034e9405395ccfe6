"""Generate with vLLM from checkpoint folders, in a process of its own: it changes PyTorch's state and holds the GPU.

    python -m tests.qwen_model.quantization.run_vllm JOB RESULTS

JOB is a JSON file: {"folders": [...], "prompts": [token ids, ...], "new_tokens": 16}. RESULTS is one that is written:
for each folder "tokens" and their "logprobs" for each prompt, or an "error".
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def generate(folder: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Return the greedy tokens of each prompt, and their log-probabilities."""
    import vllm

    engine = vllm.LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=1 << 28,
        enable_prefix_caching=False,
    )
    options = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=1, ignore_eos=True, detokenize=False)
    given = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [each.outputs[0] for each in engine.generate(given, options, use_tqdm=False)]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
            for output in outputs
        ],
    }


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process is for that
    os.environ["VLLM_NO_USAGE_STATS"] = os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm.distributed import cleanup_dist_env_and_memory

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for folder in job["folders"]:
        try:
            found[folder] = generate(folder, job["prompts"], job["new_tokens"])
        except Exception:
            found[folder] = {"error": traceback.format_exc()[-3000:]}
        cleanup_dist_env_and_memory()
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
