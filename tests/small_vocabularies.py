"""Tiny models of several vocabularies, with random parameters."""

import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from xelm.data import tokenizer as loading
from xelm.data.tokenizer_training import train
from xelm.data.vocabulary import load_vocabulary
from xelm.data.vocabulary_training import extend
from xelm.inference.ensemble import Ensemble
from xelm.inference.parameter_cache import Overlay, ParameterCache
from xelm.inference.routers import Fixed
from xelm.inference.sampling_params import SamplingParams
from xelm.inference.vocabularies import InPieces, joined, rows_for, same
from xelm.models.config import ModelConfig
from xelm.models.parameters import NEW_ROWS, for_inference, fresh_parameters
from xelm.models.vocabulary_rows import resized

TINY = ModelConfig(
    vocabulary_size=20,
    width=8,
    feedforward_width=12,
    layer_count=1,
    head_count=2,
    key_head_count=2,
    head_size=4,
    max_length=128,
)
LETTERS = {"en": "abcdefghijkl", "hy": "աբգդեզէըթժիլ", "ta": "அஆஇஈஉஊஎஏஐஒஓஔ"}
NAMES = ("en", "hy", "ta")
PIECES = {"hy": 40, "ta": 25}
SERVING = {"en": 0, "hy": 1, "ta": 2}


def texts(language: str, count: int) -> list[str]:
    draw = random.Random(language)
    words = ["".join(draw.choices(LETTERS[language], k=draw.randint(2, 5))) for _ in range(40)]
    return [" ".join(draw.choices(words, k=8)) for _ in range(count)]


TEXTS = {name: texts(name, 150) for name in NAMES}


def several(folder: Path) -> SimpleNamespace:
    """Three random models, two of which have vocabularies of their own, and their ensembles. Files
    of tokenizers are written into a folder."""
    train({"en": TEXTS["en"]}, 320, folder / "seed", algorithm="bpe")
    base = loading.load(folder / "seed")
    size = len(base.hub)
    own = {"en": None}
    for name, count in PIECES.items():
        extend(base, folder / "seed", TEXTS[name], count, size, folder / name)
        own[name] = load_vocabulary(folder / name, base, size, "tokenizer")
    model = replace(TINY, vocabulary_size=size)
    full = {}
    for seed, name in enumerate(NAMES):
        shape = resized(model, own[name].size) if own[name] else model
        fresh = fresh_parameters(shape, seed)
        full[name] = for_inference(jax.tree.map(lambda p: np.asarray(12 * p), fresh))
    cache = ParameterCache([(lambda n=n: full[n]) for n in NAMES], names=NAMES)

    def parameters(pool):
        loaders, places = [], []
        for name in NAMES:
            load, place = (lambda n=name: full[n]), name
            if not same(own[name], pool):
                load = Overlay(
                    base_name=name,
                    base=load,
                    part=lambda n=name: {NEW_ROWS: rows_for(pool, model, full[n]["embedding"])},
                )
                place = f"{name} in {pool and pool.key}"
            loaders.append(load)
            places.append(place)
        return cache.with_experts(loaders, places)

    sampling = SamplingParams(max_new_tokens=5, temperature=0.0)
    common = {"names": NAMES, "context_length": 60, "sampling": sampling}

    def ensemble(router):
        further = [
            Ensemble(
                model=resized(model, own[name].size),
                parameters=parameters(own[name]),
                router=InPieces(router=router, vocabulary=own[name], owners=[SERVING[name]]),
                tokenizer=own[name].tokenizer,
                vocabulary=own[name],
                owners=[SERVING[name]],
                **common,
            )
            for name in PIECES
        ]
        first = {"model": model, "parameters": parameters(None), "tokenizer": base}
        return joined(Ensemble(**first, router=router, **common), further)

    def alone(name):
        """One model as whoever loads its checkpoint has it."""
        shape = resized(model, own[name].size) if own[name] else model
        tokenizer = own[name].tokenizer if own[name] else base
        one = {"names": [name], "model": shape, "parameters": [full[name]]}
        router = Fixed(weights=np.zeros(1))
        return Ensemble(**{**common, **one}, tokenizer=tokenizer, router=router)

    return SimpleNamespace(ensemble=ensemble, alone=alone, own=own, full=full, model=model)
