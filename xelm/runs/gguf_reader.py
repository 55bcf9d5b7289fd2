"""Program that answers `llama_cpp.Questions` about a GGUF file with llama.cpp, through the package
xllamacpp: JSON on stdin, JSON as the last line of stdout."""

import json
import sys
import urllib.request
from typing import Any


def main() -> None:
    """Reads the file that the command line names, and answers."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    questions = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = sys.argv[1]
    longest = max(map(len, questions["prompts"]), default=0)
    parameters.n_ctx = longest + questions["new_tokens"] + 1
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = -1
    # As exact as it can be: what is compared is the file, not how fast it may be run.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = disabled
    server = xllamacpp.Server(parameters)
    # A proxy that the environment names is not for this machine's own address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def tokens(path: str, **body: Any) -> list[int]:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with opener.open(request) as response:
            return json.load(response)["tokens"]

    ids = [
        tokens("/tokenize", content=text, add_special=True, parse_special=False)
        for text in questions["texts"]
    ]
    greedy = {"temperature": 0, "return_tokens": True, "n_predict": questions["new_tokens"]}
    continuations = [
        tokens("/completion", prompt=prompt, cache_prompt=False, **greedy)
        for prompt in questions["prompts"]
    ]
    print("\n" + json.dumps({"ids": ids, "continuations": continuations}), flush=True)


if __name__ == "__main__":
    main()
