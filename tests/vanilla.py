"""A bundle as its parts in diffusers' own pipeline, put together without the package's writer."""

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from twostep.models.bundle import Bundle


def assemble(bundle: Bundle, *, zeros_for_empty: bool = False, **scheduler: object) -> StableDiffusionXLPipeline:
    """Return the pipeline with an Euler scheduler of SDXL's betas and whatever else it is told."""
    return StableDiffusionXLPipeline(
        vae=bundle.codec.vae,
        text_encoder=bundle.text.encoders[0],
        text_encoder_2=bundle.text.encoders[1],
        tokenizer=bundle.text.tokenizers[0],
        tokenizer_2=bundle.text.tokenizers[1],
        unet=bundle.denoiser.network,
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **scheduler
        ),
        force_zeros_for_empty_prompt=zeros_for_empty,
        add_watermarker=False,
    )
