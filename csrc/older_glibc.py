"""Links dlopen and CUDA's static runtime as on a system with glibc 2.28, the oldest that torch runs on.

glibc 2.34 moved threads and dlopen into libc under new symbol versions, which older systems lack; the old ones are
still there. Stand-ins for the libraries of before, linked first, make the linker take those.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

DL = "libdl.so.2"

# library -> symbol version -> what the static CUDA runtime takes from it
STAND_INS = {
    DL: {"GLIBC_2.2.5": "dlclose dlerror dlopen dlsym dlvsym", "GLIBC_2.3.4": "dlmopen"},
    "librt.so.1": {"GLIBC_2.2.5": "shm_open shm_unlink"},
    "libpthread.so.0": {
        "GLIBC_2.2.5": """
            pthread_condattr_setpshared pthread_create pthread_detach pthread_getspecific pthread_join
            pthread_key_create pthread_key_delete pthread_kill pthread_mutex_trylock pthread_mutexattr_destroy
            pthread_mutexattr_init pthread_mutexattr_setpshared pthread_mutexattr_settype pthread_once
            pthread_rwlock_destroy pthread_rwlock_init pthread_rwlock_rdlock pthread_rwlock_timedrdlock
            pthread_rwlock_timedwrlock pthread_rwlock_tryrdlock pthread_rwlock_trywrlock pthread_rwlock_unlock
            pthread_rwlock_wrlock pthread_rwlockattr_destroy pthread_rwlockattr_init
            pthread_rwlockattr_setpshared pthread_setspecific pthread_spin_destroy pthread_spin_init
            pthread_spin_lock pthread_spin_trylock pthread_spin_unlock
            sem_destroy sem_init sem_post sem_timedwait sem_trywait sem_wait
        """
    },
}


def stand_ins(compiler: str, folder: Path, cuda: bool) -> list[str]:
    """Builds the stand-ins in `folder`; their paths, for the link command before the system's libraries.

    cuda: all of them; else the one of dlopen, which a replay calls.
    """
    folder.mkdir(parents=True, exist_ok=True)
    libraries = list(STAND_INS) if cuda else [DL]
    for library in libraries:
        versions = STAND_INS[library]
        names = [name for symbols in versions.values() for name in symbols.split()]
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        script.write_text("".join(f"{v} {{ {'; '.join(s.split())}; }};\n" for v, s in versions.items()))
        flags = ["-shared", "-nostdlib", "-fno-builtin", "-x", "c", str(source), f"-Wl,-soname,{library}"]
        command = [compiler, *flags, f"-Wl,--version-script={script}", "-o", str(folder / library)]
        subprocess.run(command, check=True)
    return [str(folder / library) for library in libraries]
