"""What the paper reports (arXiv 2503.06019), to stand beside a lab's own numbers: averages, and percent retained."""

# Structure → trainable parameters in millions, average of seven benchmarks with images, percent of full fine-tuning.
IMAGES: dict[str, dict[str, tuple[float, float, float | None]]] = {
    "BlueLM-3B": {
        "full": (3161.26, 66.19, None), "lora": (458.06, 60.78, 91.82), "cogvlm-post": (1005.69, 61.26, 92.55),
        "cogvlm-pre": (1005.69, 62.20, 93.98), "cogvlm-skip": (1005.69, 63.94, 96.60),
        "genieblue-post": (1005.73, 62.10, 93.82), "genieblue-pre": (1005.73, 64.03, 96.74),
        "genieblue-skip": (1005.73, 65.52, 98.99),
    },
    "Qwen2.5-3B": {
        "full": (3527.81, 64.71, None), "lora": (456.84, 58.61, 90.58), "cogvlm-post": (1146.75, 59.88, 92.53),
        "cogvlm-pre": (1146.75, 62.17, 96.08), "cogvlm-skip": (1146.75, 62.87, 97.16),
        "genieblue-post": (1146.79, 61.26, 94.66), "genieblue-pre": (1146.79, 60.46, 93.44),
        "genieblue-skip": (1146.79, 63.26, 97.76),
    },
}  # fmt: skip
# Average of seven text benchmarks with the trained weights (a shared base), percent of the base's own; BlueLM-3B.
TEXTS: dict[str, tuple[float, float | None]] = {
    "base": (60.16, None), "full": (47.03, 78.18), "lora": (56.33, 93.63), "genieblue-post": (55.94, 92.98),
    "genieblue-pre": (53.61, 89.12), "genieblue-skip": (54.40, 90.42),
}  # fmt: skip
