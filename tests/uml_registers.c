/*
 * Lets user-mode Linux 6.1 run on a processor with AMX.
 *
 * It sets a process's registers from a buffer without AMX's, and Linux refuses a buffer of any
 * other size than the processor's own. The rest is filled with what the process has.
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define ALL_REGISTERS 0x202 /* NT_X86_XSTATE */

static char whole[65536] __attribute__((aligned(64)));

long ptrace(enum __ptrace_request request, ...)
{
    va_list list;
    long pid, word = 0;
    void *address, *data;

    va_start(list, request);
    pid = va_arg(list, long);
    address = va_arg(list, void *);
    data = va_arg(list, void *);
    va_end(list);
    pid = (pid_t)pid;
    if (request == PTRACE_SETREGSET && (long)address == ALL_REGISTERS) {
        struct iovec *given = data, all = {whole, sizeof whole};
        if (syscall(SYS_ptrace, PTRACE_GETREGSET, pid, address, &all) == 0 &&
            all.iov_len > given->iov_len) {
            memcpy(whole, given->iov_base, given->iov_len);
            return syscall(SYS_ptrace, request, pid, address, &all);
        }
    }
    if (request == PTRACE_PEEKTEXT || request == PTRACE_PEEKDATA || request == PTRACE_PEEKUSER)
        /* the library's call returns the word, the kernel's stores it */
        return syscall(SYS_ptrace, request, pid, address, &word) ? -1 : word;
    return syscall(SYS_ptrace, request, pid, address, data);
}
