/* stop.h - SIGINT and SIGTERM for commands that leave something half written when they are killed.
 *
 * After stop_catch() the first of them only sets a flag, which the command looks at between two
 * pieces of work; a second one ends the program at once.  Main thread. */
#ifndef SERVER_STOP_H
#define SERVER_STOP_H

#include <stdbool.h>

void stop_catch(void);
bool stop_asked(void);

#endif
