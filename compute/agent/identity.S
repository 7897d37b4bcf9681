# What waits in a warm state (identity.py): is told by a FIFO, and sets the clock and the kernel's random numbers by that.
# x86-64, Linux, no library. `as` and `objcopy -O binary` make of it what stands in identity.py; a test compares them.

        .intel_syntax noprefix
        .equ    TOLD, 0x401000          # struct timespec, struct rand_pool_info with 64 bytes, then text

wait:   mov     eax, 2                  # open, which waits for a writer
        lea     rdi, [rip + fifo]
        xor     esi, esi
        syscall
        mov     r12d, eax
        mov     ebx, TOLD
read:   xor     eax, eax                # read, to the end
        mov     edi, r12d
        mov     rsi, rbx
        mov     edx, 0x80000
        syscall
        test    rax, rax
        js      fail
        lea     rbx, [rbx + rax]
        jnz     read
        sub     rbx, TOLD
        jz      wait                    # somebody looked whether it waits; not closed: what the next one writes would be lost

        mov     eax, 227                # clock_settime(CLOCK_REALTIME)
        xor     edi, edi
        mov     esi, TOLD
        syscall
        mov     eax, 2                  # open(, O_WRONLY)
        lea     rdi, [rip + urandom]
        mov     esi, 1
        syscall
        mov     r12d, eax
        mov     eax, 16                 # ioctl(RNDADDENTROPY)
        mov     edi, r12d
        mov     esi, 0x40085203
        mov     edx, TOLD + 16
        syscall
        test    eax, eax
        js      fail
        mov     eax, 16                 # ioctl(RNDRESEEDCRNG): random numbers are made of that from now on
        mov     edi, r12d
        mov     esi, 0x5207
        syscall
        test    eax, eax
        js      fail
        mov     eax, 1                  # write the text
        mov     edi, 1
        mov     esi, TOLD + 88
        lea     rdx, [rbx - 88]
        syscall
        xor     eax, eax
fail:   mov     edi, eax
        mov     eax, 60                 # exit
        syscall

urandom: .asciz "/dev/urandom"
fifo:
