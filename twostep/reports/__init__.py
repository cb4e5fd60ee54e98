"""Reports: a run as one page, and how a few-step LoRA does on other bases."""
