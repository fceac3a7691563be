import pathlib
import re

from setuptools import setup

here = pathlib.Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "softvq" / "__init__.py").read_text())[1]

setup(
    name="softvq",
    version=version,
    description="Soft vector-quantised autoencoders: the operator, the models, the trainer",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    # kernels/ is a folder of its own in the checkout and softvq.kernels everywhere else: another
    # project already owns the top-level name.
    package_dir={"softvq.kernels": "kernels"},
    packages=[
        "softvq",
        "softvq.data",
        "softvq.distributed",
        "softvq.kernels",
        "softvq.models",
        "softvq.quantizers",
        "softvq.training",
    ],
    package_data={"softvq": ["py.typed"], "softvq.training": ["*.jinja"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "triton; platform_system == 'Linux'",
        "numpy",
        "pillow",
        "matplotlib",
        "scikit-learn",
        "jinja2",
        "rich",
        "safetensors",
        "tomli-w",
    ],
    extras_require={
        "dev": ["networkx", "pytest", "pytest-xdist", "ruff"],
        "tensorboard": ["tensorboard"],
        "bench": ["networkx", "vector-quantize-pytorch", "flash-kmeans", "pykeops"],
    },
    entry_points={"console_scripts": ["softvq = softvq.cli:main"]},
)
