"""Recipes: every section with its defaults, the YAML parser, validation, loading, and the bundled recipes."""

from .bundled import copy_recipe, shipped_recipes
from .loading import load_recipe, parse_recipe, parse_rope
from .schema import YARN, Base, Export, Lora, Recipe, Retrieve, Rope, Runtime

__all__ = [
    "YARN",
    "Base",
    "Export",
    "Lora",
    "Recipe",
    "Retrieve",
    "Rope",
    "Runtime",
    "copy_recipe",
    "load_recipe",
    "parse_recipe",
    "parse_rope",
    "shipped_recipes",
]
