"""The objects, styles and prompts of the UnlearnCanvas benchmark (SPEC 5.2)."""

_OBJECTS = """
Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits Sandwiches Sea
Statues Towers Trees Waterfalls
"""
_STYLES = """
Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon Cubism
Dadaism Dapple Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love Greenfield
Impressionism Ink_Art Joy Liquid_Dreams Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines On_Fire Pastel
Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust Sketch Sponge_Dabbed Structuralism Superstring Surrealism Ukiyoe
Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter
"""
OBJECTS = tuple(_OBJECTS.split())
STYLES = tuple(_STYLES.split())
"""Without Seed_Images, the benchmark's name for no style."""


def prompt_for(object_name: str, style: str | None = None) -> str:
    """`An image of Bears in Van Gogh style.`, or `An image of Bears.` without a style."""
    ending = "" if style is None else f" in {style.replace('_', ' ')} style"
    return f"An image of {object_name}{ending}."


def prompt_concepts() -> dict[str, tuple[str, ...]]:
    """{prompt: its object and, where it has one, its style} of all `prompts`."""
    plain = {prompt_for(name): (name,) for name in OBJECTS}
    return plain | {prompt_for(name, style): (name, style) for style in STYLES for name in OBJECTS}


def prompts() -> list[str]:
    """All 1020: every object without a style, then in each of the styles, the object changing fastest."""
    return [prompt_for(name, style) for style in (None, *STYLES) for name in OBJECTS]
