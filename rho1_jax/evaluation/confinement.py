"""What a model's program may ask of the kernel: a list of system calls, and Landlock for files.

Only the standard library and no rights are needed: the filter is built here, instruction by
instruction (seccomp(2)), and Landlock (kernel 5.13, landlock(7)) is spoken to by number. Both hold
for the process that calls `restrict` and `load`, for good. What is not listed is refused, so a call
that a later kernel adds is refused, too.
"""

import ctypes
import os
import struct
import sys

# name:number on x86_64:number on aarch64. What reads, computes, waits, or changes only the caller.
_ALLOWED = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 lseek:8:62 close:3:57
close_range:436:436 dup:32:23 dup2:33: dup3:292:24 pipe:22: pipe2:293:59 stat:4: fstat:5:80
lstat:6: newfstatat:262:79 statx:332:291 statfs:137:43 fstatfs:138:44 access:21: faccessat:269:48
faccessat2:439:439 readlink:89: readlinkat:267:78 getdents:78: getdents64:217:61 getcwd:79:17
chdir:80:49 fchdir:81:50 ftruncate:77:46 fsync:74:82 fdatasync:75:83 umask:95:166 poll:7:
ppoll:271:73 select:23: pselect6:270:72 epoll_create:213: epoll_create1:291:20 epoll_ctl:233:21
epoll_wait:232: epoll_pwait:281:22 eventfd2:290:19 brk:12:214 mmap:9:222 munmap:11:215
mremap:25:216 mprotect:10:226 madvise:28:233 mincore:27:232 msync:26:227 futex:202:98
set_robust_list:273:99 get_robust_list:274:100 rseq:334:293 exit:60:93 exit_group:231:94
set_tid_address:218:96 arch_prctl:158: sched_yield:24:124 sched_getaffinity:204:123 getcpu:309:168
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136
rt_sigsuspend:130:133 rt_sigtimedwait:128:137 sigaltstack:131:132 restart_syscall:219:128
pause:34: alarm:37: getitimer:36:102 setitimer:38:103 nanosleep:35:101 clock_nanosleep:230:115
clock_gettime:228:113 clock_getres:229:114 gettimeofday:96:169 time:201: times:100:153
getrusage:98:165 getrlimit:97:163 setrlimit:160:164 sysinfo:99:179 uname:63:160 getrandom:318:278
getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176
getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 getpgrp:111: getpgid:121:155
getsid:124:156 getsockname:51:204 getpeername:52:205 getsockopt:55:209 recvfrom:45:207
shutdown:48:210 membarrier:324:283 wait4:61:260 waitid:247:95
"""
# Where only the program's own folder can be written.
_WRITING = """
unlink:87: unlinkat:263:35 rmdir:84: rename:82: renameat:264:38 renameat2:316:276
"""
# These by their arguments.
_CALLS = """
open:2: openat:257:56 mkdir:83: mkdirat:258:34 clone:56:220 clone3:435:435 openat2:437:437
prlimit64:302:261 prctl:157:167 fcntl:72:25 ioctl:16:29 socketpair:53:199 sendto:44:206
"""
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
_ALLOW, _NOTIFY, _EPERM, _ENOSYS = 0x7FFF0000, 0x7FC00000, 0x00050001, 0x00050026
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_NUMBER, _ARCH = 0, 4  # where they lie in struct seccomp_data
_SECCOMP = (317, 277)
_MAKES_FILE = os.O_CREAT | 0x400000  # or O_TMPFILE, which has a bit of its own
_NEW_SPACES = 0x7E020000  # clone: CLONE_NEW*
_THREAD = 0x10000

Condition = tuple[int, int, int]  # 32-bit word of the arguments, mask, value

_READ_ONLY = (3 | os.O_TRUNC | _MAKES_FILE, 0)
# To read and cut off at once needs no right of Landlock's before kernel 6.2: it is not among these.
_ANY_OPEN = [(3 | os.O_TRUNC, flags) for flags in (0, 1, 2, 1 | os.O_TRUNC, 2 | os.O_TRUNC)]
_FCNTL = (0, 1, 2, 3, 4, 1030)  # duplicate, flags: no owner, signal, lease or lock
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # of terminals; blocking, close-on-exec


def _column() -> tuple[int, int]:
    machine = os.uname().machine
    if machine not in _MACHINES or sys.byteorder != "little":
        raise OSError(f"no list of system calls for {machine}")
    return _MACHINES[machine]


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = (word.split(":") for word in table.split())
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column]}


def _rule(number: int, action: int, conditions: tuple[Condition, ...] = ()) -> list[tuple]:
    """Instructions: if it is this call and all conditions hold, return the action; else go on."""
    code = [(_RETURN, 0, 0, action)]
    for word, mask, value in reversed(conditions):
        code[:0] = [
            (_LOAD, 0, 0, 16 + 4 * word),
            (_AND, 0, 0, mask),
            (_EQUAL, 0, len(code), value),
        ]
    return [(_LOAD, 0, 0, _NUMBER), (_EQUAL, 0, len(code), number), *code]


def allowed(writing: bool, threads: bool) -> bytes:
    """The program's filter. writing: files may be made and changed (something else says which)."""
    column, arch = _column()
    call = _numbers(_CALLS, column)
    code = [(_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _EPERM)]
    plain = _numbers(_ALLOWED, column)
    if writing:
        plain |= _numbers(_WRITING, column)
        plain |= {name: n for name, n in call.items() if name.startswith("mkdir")}
    code.append((_LOAD, 0, 0, _NUMBER))
    for number in plain.values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]

    rules: list[tuple[str, tuple[Condition, ...]]] = []
    for mask, flags in _ANY_OPEN if writing else [_READ_ONLY]:
        rules += [("open", ((2, mask, flags),)), ("openat", ((4, mask, flags),))]
    if threads:
        rules.append(("clone", ((0, _THREAD | _NEW_SPACES, _THREAD),)))
    rules.append(("prlimit64", ((0, 0xFFFFFFFF, 0),)))  # its own limits
    rules.append(("prctl", ((0, 0xFFFFFFFF, 15),)))  # a thread's name
    rules += [("fcntl", ((2, 0xFFFFFFFF, command),)) for command in _FCNTL]
    rules += [("ioctl", ((2, 0xFFFFFFFF, command),)) for command in _IOCTL]
    # A pair of streams, AF_UNIX; a datagram could be sent to any socket of the machine's.
    rules.append(("socketpair", ((0, 0xFFFFFFFF, 1), (2, 0xF, 1))))
    rules.append(("sendto", ((8, 0xFFFFFFFF, 0), (9, 0xFFFFFFFF, 0))))  # to no address
    for name, conditions in rules:
        if name in call:
            code += _rule(call[name], _ALLOW, conditions)
    for name in ("clone3", "openat2"):  # their flags lie in memory; the C library has older ones
        code += _rule(call[name], _ENOSYS)
    return _packed([*code, (_RETURN, 0, 0, _EPERM)])


def counted() -> bytes:
    """The filter that asks the listener before a thread is started, a file or folder made."""
    column, _ = _column()
    call = _numbers(_CALLS, column)
    code: list[tuple] = []
    for name in ("clone", "mkdir", "mkdirat"):
        if name in call:
            code += _rule(call[name], _NOTIFY)
    for name, word in (("open", 2), ("openat", 4)):
        for bit in (os.O_CREAT, 0x400000):
            if name in call:
                code += _rule(call[name], _NOTIFY, ((word, bit, bit),))
    return _packed([*code, (_RETURN, 0, 0, _ALLOW)])


def starts_thread(number: int) -> bool:
    return number == _numbers(_CALLS, _column()[0])["clone"]


def _packed(code: list[tuple]) -> bytes:
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def load(code: bytes, *, listen: bool = False) -> int:
    """Put a filter on this process; the listener's file, if asked for. OSError if it cannot be."""
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    number = _SECCOMP[_column()[0]]
    return _call(number, 1, 8 if listen else 0, ctypes.create_string_buffer(program))


def _call(number: int, *arguments) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# Landlock

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE = 1 << 14
# remove folders and files, make folders and files, link across folders
_CHANGE = _WRITE_FILE | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | _TRUNCATE


def landlock_version() -> int:
    """0 where the kernel has none."""
    try:
        return _call(444, None, 0, 1)
    except OSError:
        return 0


def ruleset(readable: list[str], writable: str) -> int:
    """A Landlock ruleset (its file): all else is closed, with TCP, and signals to other processes.

    readable: folders and files; writable: one folder, or "". /dev/null may be read and written.
    """
    version = landlock_version()
    files = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("QQQ", files, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _call(444, attributes, len(attributes), 0)
    for path in readable:
        _permit(rules, path, (_READ_FILE | _READ_DIR) & files)
    _permit(rules, "/dev/urandom", _READ_FILE)
    _permit(rules, "/dev/null", (_READ_FILE | _WRITE_FILE | _TRUNCATE) & files)
    if writable:
        _permit(rules, writable, (_READ_FILE | _READ_DIR | _CHANGE) & files)
    return rules


def _permit(rules: int, path: str, access: int) -> None:
    at = os.open(path, 0x200000 | os.O_CLOEXEC)  # O_PATH
    if not os.path.isdir(path):
        access &= _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
    try:
        _call(445, rules, 1, struct.pack("=Qi", access, at), 0)
    finally:
        os.close(at)


def restrict(rules: int) -> None:
    """Put this process under a ruleset, for good."""
    _call(446, rules, 0)
