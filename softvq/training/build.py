"""From a configuration to a model and its data."""

from softvq.data import DataSplits, load_data
from softvq.models import SoftVQVAE
from softvq.models.soft_vqvae import LossWeights
from softvq.quantizers import SoftVQ
from softvq.training.config import ConfigError, TrainConfig, size_pair


def build_data(config: TrainConfig) -> DataSplits:
    """The splits the configuration names. Raises DataError."""
    return load_data(
        config.data,
        config.data_dir,
        seed=config.seed,
        validation_fraction=config.validation_fraction,
        image_size=config.image_size_pair,
    )


def build_model(config: TrainConfig, image_shape: tuple[int, int, int]) -> SoftVQVAE:
    """An untrained model, on the CPU. `config` must be resolved. Raises ConfigError."""
    learned = config.temperature_schedule == "learned"
    quantizer = SoftVQ(
        config.latent_dim,
        config.codebook_size,
        temperature=1.0 if config.temperature == "auto" else float(config.temperature),
        learn_temperature=learned,
        estimator=config.estimator,
        codebook_loss=config.codebook_loss,
        commitment_weight=config.commitment_weight,
    )
    weights = LossWeights(
        reconstruction=config.reconstruction_weight,
        quantizing=config.quantizing_weight,
        kl=config.kl_weight,
        reconstruction_quantizing=config.reconstruction_quantizing_weight,
    )
    try:
        return SoftVQVAE(
            image_shape,
            size_pair(config.latent_grid),
            quantizer,
            architecture=config.architecture,
            decoder_input=config.decoder_input,
            weights=weights,
            reconstruction_loss=config.reconstruction_loss,
            quantized_codes=config.quantized_codes,
            hidden=config.hidden_sizes,
            width=config.width,
            residual_blocks=config.residual_blocks,
        )
    except ValueError as error:
        raise ConfigError(f"latent_grid: {error}") from error
