"""What the installed Transformers could run by itself, found without importing it, which takes seconds."""

import ast
import functools
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import cast

TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@functools.cache
def generating() -> Mapping[str, str]:
    """Its classes that generate text from text, and the model_type of each: of the text's part, where it has one."""
    package = find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return {}
    file = Path(package.submodule_search_locations[0], "models", "auto", "modeling_auto.py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign) or [ast.unparse(target) for target in node.targets] != [TABLE]:
            continue
        pairs = ast.literal_eval(cast(ast.Call, node.value).args[0])
        texts = {name: kind for kind, name in pairs if kind.endswith("_text")}
        return {name: kind for kind, name in reversed(pairs)} | texts
    return {}
