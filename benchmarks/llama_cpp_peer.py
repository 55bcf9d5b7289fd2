"""llama.cpp in a process of its own, beside which `inference.py` measures: checkpoints of llama's
kind as GGUF files, and the time that it takes to continue requests.

Needs `pip install 'xelm[gguf]' gguf`. Our checkpoints have no tokenizer, which llama.cpp's own
converter wants, so that the files are written here; requests are ids.
"""

import argparse
import json
import os
import resource
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Prompts = Callable[[int], list[list[int]]]
"""Number of requests -> their prompts."""
WEIGHTS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
"""Name of a precision -> llama.cpp's name of it. Norms are always float32, and in `Q8_0` each
block of 32 weights of a row has a factor of its own."""
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(checkpoint: Path, file: Path, precision: str) -> None:
    """Writes the weights of a checkpoint of llama's kind as a GGUF file, with a vocabulary of
    pieces that mean nothing. precision: one of `WEIGHTS`."""
    import gguf  # pyright: ignore[reportMissingImports]
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    kinds = gguf.TokenType
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    more = range(len(special), config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(special + [f"t{number}" for number in more])
    writer.add_token_scores([-float(number) for number in range(config["vocab_size"])])
    writer.add_token_types(types + [kinds.NORMAL] * len(more))
    kind = gguf.GGMLQuantizationType[WEIGHTS[precision]]
    with safe_open(checkpoint / "model.safetensors", framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
            values = tensors.get_tensor(name).astype(np.float32)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _interleaved(values, key_heads if "k_proj" in name else heads)
            own = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
            data = gguf.quants.quantize(np.ascontiguousarray(values), own)
            writer.add_tensor(_gguf_name(name), data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return _NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in the order of llama.cpp, where those that turn together are neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


class Contexts:
    """llama.cpp's server of each expert, in this process; made when it is needed."""

    def __init__(self, folder: Path, precision: str, slots: int, tokens: int):
        """slots: number of requests that a context continues at once. tokens: most of a request."""
        self._folder, self._precision = folder, precision
        self._slots, self._tokens = slots, tokens
        self._servers: dict[int, Any] = {}

    def _server(self, number: int) -> Any:
        import xllamacpp  # pyright: ignore[reportMissingImports]

        if number not in self._servers:
            parameters = xllamacpp.CommonParams()
            file = self._folder / f"{number}-{self._precision}.gguf"
            if not file.exists():
                write_gguf(self._folder / str(number), file, self._precision)
            parameters.model.path = str(file)
            # The contexts of all slots are one array; 256 is what llama.cpp rounds each to.
            parameters.n_ctx = self._slots * (-(-self._tokens // 256) * 256)
            parameters.n_parallel = self._slots
            parameters.n_gpu_layers = 0
            parameters.cpuparams.n_threads = len(os.sched_getaffinity(0))
            parameters.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
            parameters.cache_prompt = parameters.fit_params = False
            parameters.verbosity = -1
            self._servers[number] = xllamacpp.Server(parameters)
        return self._servers[number]

    def continued(self, number: int, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
        """New tokens of each prompt by one expert, all prompts at once."""
        server = self._server(number)
        # A proxy that the environment names is not for this machine's own address.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def one(prompt: list[int]) -> list[int]:
            body = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True}
            body |= {"samplers": ["top_k"], "top_k": 1, "cache_prompt": False}
            request = urllib.request.Request(
                server.listening_address + "/completion",
                json.dumps({**body, "return_tokens": True}).encode(),
                {"Content-Type": "application/json"},
            )
            with opener.open(request) as response:
                return json.load(response)["tokens"]

        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(one, prompts))


def bytes_of_a_weight(system: str) -> float:
    """Bytes that a weight takes in the system of `inference.py` that has this name."""
    # A block of 32 weights has 32 bytes, and two for its factor.
    sizes = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 34 / 32}
    return sizes[system.partition(",")[0].split()[-1]]


def answerer(options: argparse.Namespace, folder: Path, prompts: Prompts) -> Callable[..., dict]:
    """A function of the numbers of requests and experts, the precision and the slots of a context
    ("one", or for "all" requests of its expert) that continues the requests of one expert after
    those of another, and returns the times and tokens. options: of `inference.py`. folder: with the
    checkpoint of each expert, by its number."""
    kept: dict[tuple[str, int], Contexts] = {}

    def answer(batch: int, experts: int, precision: str, slots: str) -> dict:
        count = 1 if slots == "one" else -(-batch // experts)
        if (precision, count) not in kept:
            tokens = options.prompt + options.new
            kept[precision, count] = Contexts(folder, precision, count, tokens)
        contexts, requests = kept[precision, count], prompts(batch)

        def run(new: int) -> tuple[float, list[list[int]]]:
            tokens: list[list[int]] = [[]] * batch
            begun = options.clock()
            for number in range(min(experts, batch)):
                own = range(number, batch, experts)
                for part in ([one] for one in own) if slots == "one" else [own]:
                    found = contexts.continued(number, [requests[one] for one in part], new)
                    for one, row in zip(part, found):
                        tokens[one] = row
            return options.clock() - begun, tokens

        first, _ = run(1)
        total, tokens = run(options.new)
        return {"first": first, "total": total, "tokens": tokens}

    return answer


def memory() -> int:
    """Bytes that this process held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
