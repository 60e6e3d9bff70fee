// The event streams of the jobs that matter now.

import { events } from "/page/client.js";

const FIRST_PAUSE = 500; // milliseconds before a broken stream is opened again; doubled each time
const LONGEST_PAUSE = 30_000;

/** Open streams. `take` is called with id, name and data of each event, `ended` when a stream may be opened again. */
export class Streams {
  constructor(take, ended) {
    this.take = take;
    this.ended = ended;
    this.open = new Map();
    this.pause = FIRST_PAUSE;
  }

  /** Follow these jobs and no others. */
  follow(ids) {
    for (const [id, stop] of this.open) if (!ids.includes(id)) stop.abort();
    for (const id of ids) if (!this.open.has(id)) this.run(id);
  }

  async run(id) {
    const stop = new AbortController();
    this.open.set(id, stop);
    let complete = false;
    try {
      for await (const [name, data] of events(id, stop.signal)) {
        this.pause = FIRST_PAUSE;
        complete ||= ["done", "failed", "cancelled"].includes(name);
        this.take(id, name, data);
      }
    } catch {
      // the server is away, or the job is gone; whoever lists the jobs sees which
    }
    if (!complete && !stop.signal.aborted) {
      await new Promise((resolve) => setTimeout(resolve, this.pause));
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE);
    }
    this.open.delete(id);
    this.ended();
  }
}
