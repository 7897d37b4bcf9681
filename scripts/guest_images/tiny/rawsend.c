/* rawsend INTERFACE: sends each line of standard input, an Ethernet frame in hexadecimal, exactly as it stands.
   For the tests of the anti-spoofing filters. Prints how many frames the kernel took. */
#include <arpa/inet.h>
#include <ctype.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

static int digit(int c) { return isdigit(c) ? c - '0' : tolower(c) - 'a' + 10; }

int main(int argc, char **argv) {
    static char line[32768];
    static unsigned char frame[16384];
    int sent = 0, fd = socket(AF_PACKET, SOCK_RAW, htons(ETH_P_ALL));
    struct sockaddr_ll to = {.sll_family = AF_PACKET, .sll_halen = 6};
    if (argc != 2 || fd < 0 || !(to.sll_ifindex = if_nametoindex(argv[1]))) {
        perror("rawsend INTERFACE <FRAMES-IN-HEX");
        return 2;
    }
    while (fgets(line, sizeof line, stdin)) {
        size_t length = 0;
        for (char *at = line; isxdigit(at[0]) && isxdigit(at[1]); at += 2) frame[length++] = digit(at[0]) * 16 + digit(at[1]);
        if (length < 14) continue;
        memcpy(to.sll_addr, frame, 6);
        if (sendto(fd, frame, length, 0, (struct sockaddr *)&to, sizeof to) == (ssize_t)length) sent++;
        else perror("rawsend");
    }
    printf("rawsend: %d frames sent\n", sent);
    return 0;
}
