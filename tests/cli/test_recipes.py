"""Recipes are listed with their first line and printed to the letter."""

from twostep.training.recipe import find_recipe, recipe_names


def test_every_recipe_is_listed_with_its_first_line(run) -> None:
    listing = run("recipes")
    assert listing.exit_code == 0
    assert recipe_names()
    for name in recipe_names():
        first_line = find_recipe(name).read_text().splitlines()[0].lstrip("# ")
        assert any(name in line and first_line[:60] in line for line in listing.stdout.splitlines())


def test_a_recipe_is_printed_to_the_letter(run) -> None:
    for name in recipe_names():
        assert run("recipe", name).stdout == find_recipe(name).read_text()


def test_unknown_recipe_is_one_red_line(run) -> None:
    answer = run("recipe", "nanoo-quick")
    assert answer.exit_code == 1
    assert answer.stderr.startswith("error: ") and len(answer.stderr.splitlines()) == 1
