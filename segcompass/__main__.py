"""`python -m segcompass` is `segcompass`, so that `accelerate launch -m segcompass train grpo …` works anywhere."""

from segcompass.cli import main

main()
