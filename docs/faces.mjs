// Draws cartoon faces of 64 x 64 pixels into faces/, as many as its argument says.
//
//   npm install @dicebear/core@9 @dicebear/avataaars@9 @resvg/resvg-js@2
//   node docs/faces.mjs 4000
//
// The style "Avataaars" is by Pablo Stanley, free for personal and commercial use.
import { mkdirSync, writeFileSync } from "node:fs";
import { createAvatar } from "@dicebear/core";
import * as avataaars from "@dicebear/avataaars";
import { Resvg } from "@resvg/resvg-js";

mkdirSync("faces", { recursive: true });
for (let seed = 0; seed < Number(process.argv[2]); seed++) {
  const options = { seed: String(seed), size: 64, backgroundColor: ["b6e3f4"] };
  const svg = createAvatar(avataaars, options).toString();
  writeFileSync(`faces/${seed}.png`, new Resvg(svg).render().asPng());
}
