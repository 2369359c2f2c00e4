#!/usr/bin/env bash
# Check the types of the package with mypy:
#
#     bash dev/type_check.sh             # this clone
#     bash dev/type_check.sh --links     # only make .types/segcompass, which IDEs read too
#     bash dev/type_check.sh --wheel     # a wheel built from this clone, as users install it
#
# The parts of `segcompass` lie beside the folder segcompass/ in a clone and inside it once installed. Type checkers do
# not run `segcompass/__init__.py`, so .types/segcompass (ignored by git) shows them the installed layout, as links.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
parts="modeling_segcompass trainers loaders hub_cards"

rm -rf .types/segcompass && mkdir -p .types/segcompass
for entry in segcompass/*; do
  case ${entry##*/} in __pycache__) ;; *) ln -s "../../$entry" .types/segcompass/ ;; esac
done
for part in $parts; do ln -s "../../$part" .types/segcompass/; done
[ "${1:-}" != --links ] || exit 0

packages=$root/.types
if [ "${1:-}" = --wheel ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/clone" # a copy without ignored files: setuptools would take stale modules from build/ along
  git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from - --ignore-failed-read \
    | tar --extract --directory "$work/clone"
  python -m pip wheel --quiet --no-deps --wheel-dir "$work" "$work/clone"
  packages=$work/installed
  python -m zipfile -e "$work"/segcompass-*.whl "$packages"
fi

# In that folder, because mypy looks in the current one first. Messages then name the clone's files again.
cd "$packages"
MYPYPATH=$packages python -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.types/.mypy_cache" \
  --exclude '^segcompass/examples/' -p segcompass \
  | sed -E "s#^segcompass/(${parts// /|})/#\1/#"
