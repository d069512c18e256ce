"""Recipes: their sections with every default, the YAML parser, validation, loading, and the recipes that ship with the package."""

from .bundled import copy_recipe, shipped_recipes
from .loading import load_recipe, parse_recipe, parse_rope
from .schema import YARN, Base, Lora, Recipe, Retrieve, Rope

__all__ = [
    "YARN",
    "Base",
    "Lora",
    "Recipe",
    "Retrieve",
    "Rope",
    "copy_recipe",
    "load_recipe",
    "parse_recipe",
    "parse_rope",
    "shipped_recipes",
]
