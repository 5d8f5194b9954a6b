"""transformers' auto classes know MoST after `import most_ray`, which stays cheap, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from most_ray.model.build import init_model
from tests.support.fresh import FreshPython


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    init_model("tiny", ["User: hello\n", "\n\nAssistant: ", "seven"], folder)
    return folder


@pytest.mark.parametrize(
    "first",
    [
        "import most_ray",
        "from transformers import AutoModelForCausalLM; import most_ray",
        "import transformers.models.deepseek_v2.modeling_deepseek_v2, most_ray",
        "import most_ray, transformers.models.deepseek_v2.modeling_deepseek_v2",
        "import most_ray.model.routing",
    ],
)
def test_auto_classes_load_a_model_whatever_is_imported_first(fresh_python: FreshPython, saved: Path, first: str) -> None:
    code = (
        f"{first}; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(saved)!r}); t = AutoTokenizer.from_pretrained({str(saved)!r})\n"
        "print(type(m).__name__, t.convert_tokens_to_ids('[Hu0]') == m.config.first_audio_token)\n"
    )
    done = fresh_python.run(code)
    assert done.stdout.split() == ["MostForCausalLM", "True"], done.stderr


def test_the_import_loads_no_large_library() -> None:
    code = "import sys, most_ray; sys.exit(not {'torch', 'transformers', 'ray', 'numpy', 'pyarrow'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", ["HubertModel", "DeepseekV2ForCausalLM", "LlamaForCausalLM"])
def test_any_model_of_transformers_may_come_first(fresh_python: FreshPython, first: str) -> None:
    """Importing most_ray must not break a program that uses other models: they load the auto classes half way through themselves."""
    done = fresh_python.run(f"import most_ray, sys, transformers\ntransformers.{first}\nprint('most_ray.model.modeling' in sys.modules)")
    assert done.stdout.split() == ["True"], done.stderr
