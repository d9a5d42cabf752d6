"""The words of the embedded world: which things exist, which colours they may have, where they may stand."""

RGB = tuple[int, int, int]

NOUNS: tuple[str, ...] = (
    "circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring", "moon", "house",
    "tree", "car", "fish", "flower", "cup", "boat", "mushroom", "umbrella", "key", "lamp",
)  # fmt: skip

COLOURS: dict[str, RGB] = {
    "red": (218, 36, 40),
    "orange": (247, 140, 24),
    "yellow": (252, 220, 50),
    "green": (44, 160, 68),
    "cyan": (48, 205, 215),
    "blue": (38, 84, 214),
    "purple": (138, 54, 184),
    "pink": (252, 136, 190),
    "brown": (132, 80, 42),
    "white": (252, 252, 252),
}

# Pale or dark tones, none close to a thing's colour, so that nothing melts into its background.
BACKGROUNDS: dict[str, RGB] = {
    "gray": (186, 190, 194),
    "cream": (250, 236, 200),
    "mint": (196, 234, 208),
    "lilac": (220, 206, 244),
    "navy": (52, 62, 112),
}

SIZES: tuple[str, ...] = ("small", "large")
EXTENT: dict[str, float] = {"small": 13 / 64, "large": 19 / 64}  # side of the bounding square, share of the picture
MATERIALS: tuple[str, ...] = ("flat", "striped")
STYLES: tuple[str, ...] = ("plain", "outline")
TONES: tuple[str, ...] = ("normal", "dark", "faded")

# Centres of the three columns (and rows), share of the picture. Large things in neighbouring cells touch at worst.
CENTRES: tuple[float, float, float] = (12 / 64, 32 / 64, 52 / 64)
JITTERS: tuple[float, float, float] = (-1 / 64, 0.0, 1 / 64)
CELL_NAMES: tuple[str, ...] = (
    "top left", "top middle", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
