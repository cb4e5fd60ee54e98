"""Reports: a run as one page, students beside their teacher, a few-step LoRA on other bases."""
