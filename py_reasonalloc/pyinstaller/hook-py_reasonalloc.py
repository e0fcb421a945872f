"""PyInstaller: public names load their modules late, and files are found beside the package."""

from PyInstaller.utils.hooks import collect_data_files, collect_submodules, copy_metadata

# what the front door imports by name; commands, training and servers are for those who ask
ROOMS = ("engine", "output", "task", "profile", "trace", "session")

hiddenimports = [name for room in ROOMS for name in collect_submodules(f"py_reasonalloc.{room}")]
datas = collect_data_files("py_reasonalloc", includes=["demo/*.gguf", "profiles/**"])
datas += copy_metadata("reasonalloc")
