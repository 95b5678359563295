"""The recipes that have a name. Imports no torch."""

from alignkd.losses.recipes.recipe import Recipe

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("align-kd", reverse_kl=1.0, attention=5.0, vision=1.0),
        Recipe("paper", reverse_kl=1.0, attention=1.0, vision=1.0, normalise=False, head_map="convolution"),
        Recipe("sft"),
        Recipe("logits-only", reverse_kl=1.0),
        Recipe("teacher-projector", projector="teacher"),
        Recipe("llavadi-forward", forward_kl=1.0),
        Recipe("llavadi-reverse", reverse_kl=1.0),
        Recipe("llavadi-js", jensen_shannon=1.0),
        Recipe(
            "compodistill",
            forward_kl=1.0,
            attention=1.0,
            attention_distance="cosine",
            attention_layers="middle",
            head_map="mean",
        ),
        Recipe("visual-advantage", reverse_kl=1.0, token_weighting="advantage"),
        Recipe("beta-kd", reverse_kl=1.0, attention=0.1, vision=1.0, weighting="learned"),
    )
}
