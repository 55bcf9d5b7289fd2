"""The card of an expert: what the Hub reads, and what a person reads."""

import yaml

from experts.card import card
from experts.expert import Expert
from experts.registry import Registry

SLAVIC = Expert(
    name="slavic", languages=("ru", "no"), cluster="slavic", tokens=12_345, sha256={"x": "a" * 64}
)
PL = Expert(
    name="pl",
    languages=("pl",),
    parent="slavic@v1",
    round=2,
    tokens=1_000,
    status="published",
    sha256={"model.safetensors": "b" * 64, "config.json": "d" * 64},
)
REGISTRY = Registry(seed_sha256={"model.safetensors": "c" * 64}, experts=(SLAVIC, PL))


def _front_matter(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_front_matter_is_what_the_hub_wants():
    facts = {"base_model": "facebook/xglm-564M", "license": "mit", "perplexity": 7.5}
    assert _front_matter(card(PL, REGISTRY, facts)) == {
        "language": ["pl"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["xelm"],
        "base_model": "facebook/xglm-564M",
        "license": "mit",
    }


def test_the_card_of_an_encoder_says_how_it_is_loaded():
    text = card(PL, REGISTRY, {}, masked=True)
    assert _front_matter(text)["pipeline_tag"] == "fill-mask"
    assert "model = AutoModelForMaskedLM.from_pretrained(directory)" in text.splitlines()
    assert "CausalLM" not in text


def test_norwegian_stays_a_language_and_unknown_facts_are_left_out():
    front = _front_matter(card(SLAVIC, REGISTRY, {}))
    assert front["language"] == ["ru", "no"]
    assert "base_model" not in front and "license" not in front


def test_the_text_tells_where_the_expert_came_from():
    text = card(PL, REGISTRY, {"perplexity | valid": 7.5, "license": "mit"})
    for line in (
        "# pl",
        "| parent | slavic@v1 |",
        "| lineage | pl@v1 ← slavic@v1 ← seed |",
        "| round | 2 |",
        "| tokens of training | 1,000 |",
        "| perplexity \\| valid | 7.5 |",
        f"| `config.json` | `{'d' * 64}` |",
        f"| `model.safetensors` | `{'b' * 64}` |",
        "model = AutoModelForCausalLM.from_pretrained(directory)",
    ):
        assert line in text.splitlines()
    assert "| license |" not in text


def test_the_card_of_a_cluster_of_documents_names_every_language_in_it():
    documents = {"ru": 9, "pl": 2}
    expert = Expert(name="c0", cluster="c0", languages=("ru",), documents=documents)
    text = card(expert, Registry(seed_sha256={}, experts=(expert,)), {})
    assert _front_matter(text)["language"] == ["ru", "pl"]
    assert "documents like those of one cluster, in ru, pl." in text
