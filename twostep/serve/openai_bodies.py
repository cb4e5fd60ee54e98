"""What bodies of OpenAI's APIs have in common here, whichever medium they ask for."""

from __future__ import annotations

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from twostep.serve.catalogue import Wish, random_seed


class OpenAiBody(BaseModel):
    """The fields that are read for every medium; unknown ones are let through unread."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    model: str | None = None
    seed: int | None = Field(default=None, ge=0)
    steps: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("steps", "num_inference_steps")
    )
    guidance: float | None = Field(
        default=None, ge=0, validation_alias=AliasChoices("guidance_scale", "guidance")
    )
    negative_prompt: str | None = None

    def plain_wish(self, prompt: str) -> Wish:
        """Return the wish that these fields make; a seed that is left out is picked."""
        return Wish(
            prompt,
            model=self.model,
            seed=random_seed() if self.seed is None else self.seed,
            steps=self.steps,
            guidance=self.guidance,
            negative_prompt=self.negative_prompt or "",
        )
