// The files of finished jobs, fetched once each.

import { ask } from "/page/client.js";

const fetched = new Map();

/** An address within this page of a result of a job. */
export function resultUrl(job, number) {
  const { url } = job.results[number];
  if (!fetched.has(url)) {
    const address = ask(url)
      .then((answer) => answer.blob())
      .then((blob) => URL.createObjectURL(blob));
    address.catch(() => fetched.delete(url));
    fetched.set(url, address);
  }
  return fetched.get(url);
}

/** Give the memory of the results of a job back. */
export function forget(job) {
  for (const { url } of job.results) {
    fetched.get(url)?.then(URL.revokeObjectURL, () => {});
    fetched.delete(url);
  }
}

/** A name for a result that is saved. */
export function fileName(job, number) {
  const { media_type: media, seed } = job.results[number];
  const words = job.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? ["result"];
  const suffix = { "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "video/mp4": "mp4" }[media] ?? "safetensors";
  return `${words.slice(0, 6).join("-").slice(0, 60)}-${seed}.${suffix}`;
}

/** Save a result as a file. */
export async function save(job, number) {
  const link = document.createElement("a");
  link.href = await resultUrl(job, number);
  link.download = fileName(job, number);
  link.click();
}
