"""Makes the patches beside it anew, after a change to what they change: python docs/forks/remake.py [NAME ...]

Each is merged into a worktree of HEAD (git apply --3way), so commit first. Where that leaves conflicts the patch stays as it is,
and the worktree too, to be mended by hand.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def git(*argv, cwd: Path = HERE) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *map(str, argv)], cwd=cwd, capture_output=True, text=True)


def remake(patch: Path) -> bool:
    """Returns whether the patch is that of today's tree now; says what was done, or what is left to do."""
    tree = Path(tempfile.mkdtemp(prefix=f"fork-{patch.stem}-"))
    git("worktree", "add", "--detach", tree, "HEAD").check_returncode()
    diff = ["diff", "-U2", "--full-index", "HEAD"]
    merged = git("apply", "--3way", patch, cwd=tree)
    if merged.returncode:
        print(f"{patch.stem}: needs a hand:\n{merged.stderr}  Mend it in {tree}, and then\n"
              f"  git -C {tree} {' '.join(diff)} > {patch} && git worktree remove --force {tree}")
        return False
    before, after = patch.read_text(), git(*diff, cwd=tree).stdout
    patch.write_text(after)
    git("worktree", "remove", "--force", tree)
    print(f"{patch.stem}: {'as it was' if after == before else 'made anew'}")
    return True


if __name__ == "__main__":
    patches = [HERE / f"{name}.patch" for name in sys.argv[1:]] or sorted(HERE.glob("*.patch"))
    sys.exit(not all([remake(patch) for patch in patches]))  # a list: one that fails does not keep the others from being made
