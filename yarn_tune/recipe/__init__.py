"""Recipes: every section with its defaults, the YAML parser, validation, loading, and the bundled recipes."""

from .bundled import ADAPTERS, copy_recipe, published_sizes, shipped_recipes
from .keys import Key, recipe_keys
from .loading import checksum_line, load_recipe, open_recipe, parse_recipe, parse_rope, parse_sections
from .named_files import COMPRESSED, HUB, KINDS, is_hub_id, kind_of, matching_files, missing_files, what_is
from .parsing import read_yaml
from .results_schema import Eval, Export, Retrieve, StackName
from .schema import METHODS, RAMPED, YARN, Base, Data, Decays, Lora, Rates, Recipe, Rope, Runtime, Train

__all__ = [
    "ADAPTERS",
    "COMPRESSED",
    "HUB",
    "KINDS",
    "METHODS",
    "RAMPED",
    "YARN",
    "Base",
    "Data",
    "Decays",
    "Eval",
    "Export",
    "Key",
    "Lora",
    "Rates",
    "Recipe",
    "Retrieve",
    "Rope",
    "Runtime",
    "StackName",
    "Train",
    "checksum_line",
    "copy_recipe",
    "is_hub_id",
    "kind_of",
    "load_recipe",
    "matching_files",
    "missing_files",
    "open_recipe",
    "parse_recipe",
    "parse_rope",
    "parse_sections",
    "published_sizes",
    "read_yaml",
    "recipe_keys",
    "shipped_recipes",
    "what_is",
]
